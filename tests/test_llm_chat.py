"""Chats without a server: `LLM.chat`, `LLM.stream` and the terminal chat on the compiled tiny engine, with transformers' own
template as the oracle of prompts."""

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny_tasks import TASKS, Question, questions

from backend import LLM, RequestError, SamplingConfig
from backend.chat.tools import ToolCall
from backend.generation import Generation, Piece
from backend.terminal_chat import TerminalChat

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def llm(engine_dir) -> LLM:
    return LLM(engine_dir)


def some(task: str, count: int = 4) -> list[Question]:
    return list(itertools.islice(questions(2026, held_out=True, tasks=(task,)), count))


def test_prompts_after_apply_chat_template(llm, chat_tokenizer):
    """The recipe's offline example: transformers makes the prompts, greedy decoding answers all of them."""
    asked = [question for task in ("sum", "reverse", "count") for question in some(task)]
    prompts = [
        chat_tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False) for question in asked
    ]
    results = llm.generate(prompts, SamplingConfig(temperature=0.0, max_tokens=1024, seed=0))
    assert [result.text for result in results] == [question.answer for question in asked]


@pytest.mark.parametrize("task", TASKS)
def test_a_chat_is_what_its_prompt_gives(llm, render, task):
    asked = some(task)
    config = SamplingConfig(seed=3)
    for question in asked:
        [chat] = llm.chat(
            question.messages, config, tools=question.tools, chat_template_kwargs={"enable_thinking": question.enable_thinking}
        )
        [raw] = llm.generate(render(question), SamplingConfig(seed=3, skip_special_tokens=False))
        assert raw.text == question.answer
        assert (chat.token_ids, chat.num_prompt_tokens) == (raw.token_ids, raw.num_prompt_tokens)
        assert "<" not in chat.text + chat.reasoning


def test_many_chats_are_one_batch(llm):
    asked = some("sum", 6)
    results = llm.chat([question.messages for question in asked], SamplingConfig(seed=1))
    assert [result.text for result in results] == [question.answer for question in asked]


def test_a_thought_is_apart(llm):
    for question in some("thought"):
        thought, _, answer = question.answer.removeprefix("<|channel>thought\n").partition("<channel|>")
        [result] = llm.chat(question.messages, SamplingConfig(seed=1), chat_template_kwargs={"enable_thinking": True})
        assert (result.reasoning, result.text, result.finish_reason) == (thought, answer, "stop")


def tool_question(task: str) -> Question:
    return next(question for question in questions(2026, held_out=True, tasks=("tool",)) if question.task == task)


@pytest.mark.parametrize("choice", [None, "auto", "required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_call(llm, choice):
    question = next(
        question
        for question in questions(2026, held_out=True, tasks=("tool",))
        if question.task == "tool" and "weather" in question.answer
    )
    [result] = llm.chat(question.messages, SamplingConfig(seed=1), tools=question.tools, tool_choice=choice)
    city = question.answer.split('<|"|>')[1]
    assert result.tool_calls == [ToolCall(name="weather", arguments=f'{{"city": "{city}"}}')]
    assert (result.text, result.finish_reason) == ("", "tool_calls")


@pytest.mark.parametrize("held_to_a_grammar", [False, True])
def test_one_call_is_all_that_is_generated_where_no_more_are_wanted(llm, held_to_a_grammar):
    """Given calls, or a grammar that lets no answer end: more calls follow the first, over several canvases, or none does."""
    cities = {"type": "object", "properties": {"city": {"enum": ["ulm"]}}, "additionalProperties": False}
    more = {"tools": [{"type": "function", "function": {"name": "weather", "parameters": cities}}]}
    if held_to_a_grammar:
        config, more["tool_choice"] = SamplingConfig(seed=1, max_tokens=100, ignore_eos=True), "required"
    else:
        call = '<|tool_call>call:weather{city:<|"|>ulm<|"|>}<tool_call|>'
        config = SamplingConfig(seed=1, infill=[f"So: {call} and {call}", 20, "<turn|>"])
    messages = [{"role": "user", "content": "What is the weather in ulm?"}]
    [many] = llm.chat(messages, config, **more)
    [one] = llm.chat(messages, config, **more, parallel_tool_calls=False)
    assert len(many.tool_calls) > 1 and len(many.num_steps) > 1
    assert (one.tool_calls, one.finish_reason, len(one.num_steps)) == (many.tool_calls[:1], "tool_calls", 1)
    assert one.token_ids == many.token_ids[: len(one.token_ids)]
    assert llm.tokenizer.id_to_token(one.token_ids[-1]) == "<tool_call|>"
    assert one.text == ("" if held_to_a_grammar else "So: ")
    pieces = list(llm.stream_chat(messages, config, **more, parallel_tool_calls=False))
    assert [piece.tool_calls for piece in pieces] == [one.tool_calls]


def test_stop_strings_are_looked_for_in_the_answers_text_alone(llm):
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    for question in some("thought", 2):
        [whole] = llm.chat(question.messages, SamplingConfig(seed=1), **thinking)
        assert whole.reasoning
        for stop in ("\n", "thought", "|", whole.reasoning[:2]):
            [result] = llm.chat(question.messages, SamplingConfig(seed=1, stop=stop), **thinking)
            assert result.reasoning == whole.reasoning
            assert result.text == whole.text.partition(stop)[0]
    question = tool_question("tool")
    [whole] = llm.chat(question.messages, SamplingConfig(seed=1), tools=question.tools)
    for stop in ('"', ":", "call"):
        [result] = llm.chat(question.messages, SamplingConfig(seed=1, stop=stop), tools=question.tools)
        assert result.tool_calls == whole.tool_calls != []
        assert result.finish_reason == "tool_calls"


def test_pieces_together_are_the_result(llm):
    for question in (some("count", 1)[0], some("thought", 1)[0], tool_question("tool")):
        more = {"tools": question.tools, "chat_template_kwargs": {"enable_thinking": question.enable_thinking}}
        [expected] = llm.chat(question.messages, SamplingConfig(seed=1), **more)
        result, drafts = Generation(), []
        for piece in llm.stream_chat(question.messages, SamplingConfig(seed=1), draft_interval_s=0, **more):
            drafts.append(piece) if piece.is_draft else result.add(piece)
        assert result == expected
        # One draft after every step that does not finish its canvas.
        assert [sum(draft.canvas_index == index for draft in drafts) for index in range(len(result.num_steps))] == [
            steps - 1 for steps in result.num_steps
        ]
        assert not any("<|" in draft.text + draft.reasoning for draft in drafts)


def test_a_stream_of_a_plain_prompt(llm, render):
    prompt = render(some("count", 1)[0])
    pieces = list(llm.stream(prompt, SamplingConfig(seed=1)))
    [expected] = llm.generate(prompt, SamplingConfig(seed=1))
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_a_stream_left_early_makes_room(llm):
    stream = llm.stream("Count from 3 to 31.", SamplingConfig(ignore_eos=True, max_tokens=3000))
    next(stream)
    stream.close()
    assert llm.generate("Add 1 and 2.", SamplingConfig(max_tokens=1))[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([{"role": "user"}],), "messages[0].content: got nothing"),
        (("hello",), "messages: got a value of type str, expected a list of messages"),
        (({"role": "user", "content": "a"},), "messages: got a value of type dict, expected a list of messages"),
        ((None,), "messages: got a value of type NoneType, expected a list of messages"),
        (([[{"role": "user", "content": "a"}], [{"role": "x", "content": "b"}]],), "messages[0].role: got 'x'"),
        (([],), None),
    ],
)
def test_refusals(llm, arguments, message):
    if message is None:
        assert llm.chat(*arguments) == []
        return
    with pytest.raises(RequestError) as raised:
        llm.chat(*arguments)
    assert message in str(raised.value)


def test_refused_variables_of_the_template(llm):
    with pytest.raises(RequestError, match=r"^chat_template_kwargs: got 'x', expected an object of variables"):
        llm.chat([{"role": "user", "content": "a"}], chat_template_kwargs="x")


def typed(llm: LLM, *lines: str, terminal: bool) -> tuple[str, str, bool]:
    """What is shown as answers and as notes, and whether every question was answered."""
    out, notes = io.StringIO(), io.StringIO()
    consoles = [Console(file=file, force_terminal=terminal, width=100) for file in (out, notes)]
    all_answered = TerminalChat(llm, consoles[0], SamplingConfig(seed=1), notes=consoles[1]).run(lines)
    return out.getvalue(), notes.getvalue(), all_answered


def test_the_terminal_chat(llm):
    first, second = some("sum", 2)
    question, other = (each.messages[0]["content"] for each in (first, second))
    answers = f"{first.answer}\n{second.answer}\n"
    assert typed(llm, question, "/new", other, "/quit", "never asked", terminal=False) == (answers, "", True)
    shown, notes, _ = typed(llm, question, terminal=True)
    assert first.answer in shown and "denoising steps a canvas" in notes
    thought, notes, _ = typed(llm, "/think", question, terminal=False)
    assert notes == "thinking on\n" and thought.endswith(f"\n{first.answer}\n") and "=" in thought
    shown, _, _ = typed(llm, "/think", question, terminal=True)
    *_, thought, answer, _ = shown.splitlines()  # the last one shows the cursor again
    assert "\x1b[3m" in thought and "\x1b[3m" not in answer and first.answer in answer
    nothing, notes, all_answered = typed(llm, "/nonsense", terminal=False)
    assert (nothing, all_answered) == ("", False)
    assert notes.startswith("error: got '/nonsense', which is no command; ") and "/quit" in notes


def test_an_answer_that_is_not_for_a_terminal_is_as_the_model_wrote_it():
    text = "all:\n\t[bold]make[/bold] é\n"
    piece = Piece(text=text, reasoning="", tool_calls=[], token_ids=[1], canvas_index=0, num_steps=1, is_draft=False)
    answering = SimpleNamespace(stream_chat=lambda *_, **choices: [piece])
    assert typed(answering, "a Makefile, please", terminal=False) == (f"{text}\n", "", True)


def test_a_template_that_knows_no_thinking_is_asked_for_none():
    asked = []
    answering = SimpleNamespace(stream_chat=lambda *_, chat_template_kwargs, **__: asked.append(chat_template_kwargs) or [])
    typed(answering, "one", "/think", "two", "/think", "three", terminal=False)
    assert asked == [{}, {"enable_thinking": True}, {}]


def test_pictures_are_counted():
    _, notes, _ = typed(SimpleNamespace(), "/image a.png", "/image b.png", terminal=False)
    assert notes == "1 picture for the next question\n2 pictures for the next question\n"


@pytest.mark.parametrize("bad", ["a" * 5000, "caf\udce9"])
def test_the_terminal_chat_goes_on_after_a_question_that_is_refused(llm, bad):
    [question] = some("sum", 1)
    answers, notes, all_answered = typed(llm, bad, question.messages[0]["content"], terminal=False)
    assert (answers, all_answered) == (f"{question.answer}\n", False)
    assert notes.startswith("error: ") and notes.count("\n") == 1


@pytest.mark.parametrize("text", ["a\ud800", "caf\udce9"])
def test_text_with_half_of_a_surrogate_pair_is_refused(llm, text):
    for ask in (llm.generate, lambda prompt: llm.chat([{"role": "user", "content": prompt}])):
        with pytest.raises(RequestError) as raised:
            ask(text)
        assert (
            str(raised.value)
            == f"prompt: got U+{ord(text[-1]):04X}, half of a surrogate pair, expected text; was its source in UTF-8?"
        )


def test_the_chat_command_answers_standard_input(engine_dir):
    [question] = some("reverse", 1)
    command = [sys.executable, "-m", "backend", "chat", "--engine", str(engine_dir), "--sampling", '{"seed": 1}']
    asked = question.messages[0]["content"]
    done = subprocess.run(command, input=f"{asked}\n", capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == f"{question.answer}\n"
    lines = "caf\xe9\n/image a.png\n/new\n".encode("latin-1") + asked.encode()
    for reading in ("surrogateescape", "strict"):  # what Python does with bytes that are not UTF-8 depends on the locale
        environment = os.environ | {"PYTHONIOENCODING": f"utf-8:{reading}"}
        done = subprocess.run(command, input=lines, capture_output=True, cwd=ROOT, env=environment)
        assert (done.returncode, done.stdout.decode()) == (1, f"{question.answer}\n")
        error, note = done.stderr.decode().splitlines()
        assert error.startswith("error: ") and note == "1 picture for the next question"

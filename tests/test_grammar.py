"""Structured output: what may be asked for, how a canvas is held to it, and the answers that come of it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from small_checkpoints import TINY
from test_sampling_config import DEFAULTS, refusal
from tokenizers import Tokenizer

from backend import LLM, RequestError, SamplingConfig
from backend.answer_grammar import AnswerGrammar, Grammars
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults
from backend.grammar import MAX_GRAMMAR_LENGTH
from backend.grammar_check import check_grammar
from backend.session import Session
from contract.manifest import ManifestError

EOS, STOP = 1, 6
ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}},
    "required": ["answer"],
    "additionalProperties": False,
}
FORMS = (
    'one of {"json": a JSON schema}, {"json_object": true}, {"regex": a text}, {"choice": a list of texts} and '
    '{"grammar": a text in llguidance\'s form of Lark}'
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def begin(tokenizer):
    """A grammar of an answer that ends at token 1, or before the stop token 6."""
    grammars = Grammars(tokenizer, tokenizer.get_vocab_size())

    def of(structure: dict, **choices) -> AnswerGrammar:
        config = SamplingConfig(structured_outputs=structure, **choices)
        return grammars.answer(replace(config.resolve(DEFAULTS), eos_token_ids=(EOS,)))

    return of


@pytest.fixture(scope="module")
def ids(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def names(tokenizer: Tokenizer, allowed: np.ndarray) -> set[str]:
    return {tokenizer.id_to_token(int(token)) for token in np.flatnonzero(allowed)}


def rename(vocab: dict[str, int], token: str, name: str) -> None:
    vocab[name] = vocab.pop(token)


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda vocab: rename(vocab, "<0xE1>", "<0x:1>"), "what llguidance refuses: called `Result::unwrap()` on an"),
        (lambda vocab: rename(vocab, "<0x3B>", "<0x3B>9"), "what llguidance refuses: assertion failed: !tok_name"),
        (lambda vocab: vocab.update({"Add": vocab["▁f"]}), "what llguidance refuses: error loading tokenizer"),
        (lambda vocab: vocab.update({"x1": 4_000_000_000}), "the id 4000000000 of the token 'x1' among "),
    ],
    ids=["a byte of no number", "a byte and more", "an id of two tokens", "an id out of all bounds"],
)
def test_a_tokenizer_that_llguidance_cannot_take(damage, got):
    """For some its Rust panics, which is no Exception."""
    content = json.loads((TINY / "tokenizer.json").read_text())
    damage(content["model"]["vocab"])
    grammars = Grammars(Tokenizer.from_str(json.dumps(content)), 448)
    with pytest.raises(ManifestError) as refused:
        grammars.prepare()
    line = str(refused.value)
    assert line.startswith(f"tokenizer.json: got {got}") and "\n" not in line
    assert line.endswith("; expected that of the checkpoint; download it again, and build the engine again")


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ("json", f"structured_outputs: got 'json', expected {FORMS}"),
        ({}, f"structured_outputs: got {{}}, expected {FORMS}"),
        ({"regex": "a", "choice": ["a"]}, f"structured_outputs: got {{'regex': 'a', 'choice': ['a']}}, expected {FORMS}"),
        ({"xml": "a"}, f"structured_outputs: got {{'xml': 'a'}}, expected {FORMS}"),
        ({"json": 3}, "structured_outputs.json: got 3, expected a JSON schema, an object"),
        ({"json": "{"}, "structured_outputs.json: got malformed JSON (Expecting property name enclosed in double quotes at "),
        ({"json": {"maximum": float("nan")}}, "structured_outputs.json: got {'maximum': nan}, which is refused: Out of range "),
        (
            {"json": json.loads('{"items": ' * 300 + "{}" + "}" * 300)},
            "structured_outputs.json: got {'items': {'items': {'items'",
        ),
        ({"json": {"x-guidance": {"lenient": True}}}, "structured_outputs.json: got x-guidance, which would change how "),
        ({"json_object": False}, "structured_outputs.json_object: got False, expected true"),
        ({"regex": ""}, "structured_outputs.regex: got '', expected a non-empty text"),
        ({"regex": "a\\"}, "structured_outputs.regex: got 'a\\\\', expected no single backslash at the end; double it"),
        ({"regex": "\ud800"}, "structured_outputs.regex: got '\\ud800', with half of a surrogate pair, expected text"),
        ({"choice": []}, "structured_outputs.choice: got [], expected a list of non-empty texts"),
        ({"choice": "yes"}, "structured_outputs.choice: got 'yes', expected a list of non-empty texts"),
        ({"choice": ["a", 1]}, "structured_outputs.choice: got 1, expected a non-empty text"),
        ({"regex": "a" * MAX_GRAMMAR_LENGTH}, "structured_outputs.regex: got "),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_grammar(structure, message):
    line = refusal(SamplingConfig, structured_outputs=structure)
    assert line.startswith(message)
    assert "\n" not in line and len(line) < 400
    assert refusal(SamplingConfig.from_mapping, {"structured_outputs": structure}) == line


PATTERNS = {"pattern": "^(a|b)*a(a|b){20}$", "allOf": [{"pattern": f"a.{{{number}}}$"} for number in range(60)]}
RULES = "\n".join(f"r{number}: r{number + 1}" for number in range(4600))


@pytest.mark.parametrize(
    ("structure", "problem"),
    [
        ({"json": {"type": "objekt"}}, "Invalid type: objekt"),
        ({"json": {"if": {}}}, 'Unimplemented keys: ["if"]'),
        (
            {"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
            "oneOf constraints are not supported, but where no two alternatives can both fit; use anyOf",
        ),
        ({"regex": "a("}, 'at 1(8): invalid regex "a(" (in regex): regex parse error error: unclosed group'),
        ({"grammar": "start: missing"}, 'at 1(8): unknown name: "missing"'),
        ({"json": {"type": "string", **PATTERNS}}, "got a grammar that takes more than a second or 2 GB to make"),
        ({"json": {"type": "integer", "multipleOf": 999983}}, "got a grammar that takes more than a second or 2 GB to make"),
        ({"grammar": f'start: r0\n{RULES}\nr4600: "a"'}, "got a grammar that takes more than a second or 2 GB to make"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_llguidance_refuses_hangs_over_or_crashes_on_ends_one_request(structure, problem):
    """In a process of its own. The last has nearly as many rules as fit."""
    grammar = SamplingConfig(structured_outputs=structure).structured_outputs
    for _ in range(2):
        assert refusal(check_grammar, grammar) == f"structured_outputs: {problem}; change the grammar"


def test_what_is_right_is_looked_at_once(monkeypatch):
    grammar = SamplingConfig(structured_outputs={"regex": "once only"}).structured_outputs
    check_grammar(grammar)
    monkeypatch.setattr("subprocess.run", None)
    check_grammar(grammar)
    check_grammar(None)


def test_an_answer_is_given_or_described():
    assert refusal(SamplingConfig, infill=["a"], structured_outputs={"regex": "a"}) == (
        "infill and structured_outputs: both given, but each says what the answer is; remove one"
    )


def test_a_token_that_nobody_has_is_refused_with_the_tokenizer(begin):
    with pytest.raises(RequestError, match=r"^structured_outputs: .*<\|nowhere\|>.*; change the grammar$") as raised:
        begin({"grammar": "start: <|nowhere|>"})
    assert raised.value.code == "INVALID_ARGUMENT"


def test_the_first_token_is_one_that_the_grammar_allows(begin, tokenizer):
    assert names(tokenizer, begin({"choice": ["What", "yes"]}).allowed()) == {"W", "Wh", "Wha", "What", "y", "<0x57>", "<0x79>"}
    assert names(tokenizer, begin({"json": ANSWER}).allowed()) == {"{"}


def test_an_end_is_allowed_where_the_answer_may_end(begin, tokenizer, ids):
    grammar = begin({"regex": "[ab]+"})
    letters = {"a", "b", "<0x61>", "<0x62>"}
    assert names(tokenizer, grammar.allowed()) == letters
    grammar.take(ids("a"))
    assert names(tokenizer, grammar.allowed()) == {*letters, "<eos>"}
    assert names(tokenizer, begin({"regex": "[ab]*"}).allowed()) == {*letters, "<eos>"}


def test_what_would_keep_others_waiting_is_refused(begin, ids):
    """A grammar that has thousands of readings at once; a choice of thousands has one."""
    with pytest.raises(RequestError, match=r"^structured_outputs: .*row has \d+ items; max is 300.*; change the grammar$"):
        begin({"grammar": 'start: s\ns: s s s | s s | "a" | ""'}).fitted(ids("a" * 99), None, 99)
    choices = [f"{number:,} miles" for number in range(1800)]
    assert begin({"choice": choices}).fitted(ids("1,234 miles"), EOS, 99) == (ids("1,234 miles"), [], "stop")


def test_a_stop_token_may_end_an_answer_anywhere(begin, ids):
    """But for one that is an end-of-sequence token too, which the grammar must let."""
    grammar = begin({"regex": "[ab]+;"}, stop_token_ids=[STOP, EOS])
    grammar.take(ids("ab"))
    assert grammar.allowed()[STOP] and not grammar.allowed()[EOS]
    assert grammar.fitted([], STOP, 9) == ([], [], "stop")


def test_a_stop_token_that_the_grammar_adds_ends_the_answer(begin, ids):
    """As it would if the model had written it; max_tokens comes first."""
    [stop] = ids("d")
    grammar = begin({"regex": "ab cd"}, stop_token_ids=[stop])
    assert grammar.fitted(ids("ax"), None, 99) == (ids("a"), [*ids("b"), *ids(" "), *ids("c")], "stop")
    assert grammar.fitted(ids("ax"), None, 5) == (ids("a"), [*ids("b"), *ids(" "), *ids("c")], "stop")
    assert grammar.fitted(ids("ax"), None, 4) == (ids("a"), [*ids("b"), *ids(" "), *ids("c")], "length")
    assert begin({"regex": "ab"}, stop_token_ids=ids("a")).fitted(ids("x"), None, 9) == ([], [], "stop")


def test_what_follows_is_added_as_far_as_it_is_text(begin, ids):
    """llguidance would have the token <eos> next."""
    assert begin({"choice": ["ab<eos>cd"]}).fitted(ids("ax"), None, 99) == (ids("a"), ids("b"), None)


@pytest.mark.parametrize(
    ("structure", "given"),
    [
        ({"choice": ["<|channel>"]}, ""),
        ({"json": {"const": "<|channel>"}}, '"'),
        ({"regex": "a<pad>b"}, "a"),
        ({"json": {"type": "object", "properties": {"<bos>": {}}, "required": ["<bos>"]}}, '{"'),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_text_that_would_have_to_be_a_special_token_is_refused_as_such(structure, given, begin, ids):
    """llguidance offers that token, and accepts it not."""
    grammar = begin(structure)
    grammar.take(ids(given))
    with pytest.raises(RequestError, match=r"no token of the vocabulary can follow") as raised:
        grammar.allowed()
    assert raised.value.code == "INVALID_ARGUMENT"


def test_special_tokens_that_a_grammar_names_are_allowed(begin, tokenizer):
    assert names(tokenizer, begin({"grammar": 'start: <|channel> "a"'}).allowed()) == {"<|channel>"}


def test_a_token_that_the_tokenizer_does_not_have_ends_what_is_kept(tokenizer, ids):
    """A model may have more tokens than its tokenizer."""
    config = SamplingConfig(structured_outputs={"regex": r"(.|\n)*"}).resolve(DEFAULTS)
    grammar = Grammars(tokenizer, tokenizer.get_vocab_size() + 30).answer(config)
    assert grammar.fitted([*ids("ab"), tokenizer.get_vocab_size() + 5, *ids("c")], None, 99) == (ids("ab"), [], None)


def test_a_grammar_is_made_once_for_all_requests_that_bring_it(begin, ids, monkeypatch):
    first = begin({"regex": "made once"})
    monkeypatch.setattr("backend.answer_grammar.LLMatcher", None)
    second = begin({"regex": "made once"})
    first.take(ids("made"))
    assert second.fitted(ids("made once"), EOS, 99) == (ids("made once"), [], "stop")


def test_what_no_token_can_follow_is_refused(tokenizer):
    """The model has fewer tokens than its tokenizer, and not that of the letter a."""
    config = SamplingConfig(structured_outputs={"regex": "a+"}).resolve(DEFAULTS)
    with pytest.raises(RequestError, match=r"^structured_outputs: no token of the vocabulary can follow; change the grammar$"):
        Grammars(tokenizer, 30).answer(config).allowed()


@pytest.mark.parametrize(
    ("regex", "canvas", "end", "room", "kept", "added", "reason"),
    [
        ("[ab]+", "abba", None, 99, "abba", "", None),
        ("[ab]+", "abba", EOS, 99, "abba", "", "stop"),
        ("[ab]+", "abba", STOP, 99, "abba", "", "stop"),
        ("[ab]+", "abba", None, 4, "abba", "", "length"),
        ("[ab]+", "abcba", None, 99, "ab", "", None),
        ("[ab]+", "abcba", EOS, 99, "ab", "", None),
        ("[ab]+;", "abba", EOS, 99, "abba", "", None),
        ("[ab]+;", "abba", STOP, 99, "abba", "", "stop"),
        ("[ab]+;", "ab;cc", None, 99, "ab;", "", "stop"),
        ("[ab]+", "ab<eos>ab", None, 99, "ab", "", None),
        ("[ab]+;", "ab;cc", None, 3, "ab;", "", "stop"),
        ("ab cd?", "abc", None, 99, "ab", " c", None),
        ("ab cd", "axc", None, 99, "a", "b cd", "stop"),
        ("ab cd", "axc", None, 3, "a", "b ", "length"),
        ("ab cd", "axc", None, 5, "a", "b cd", "stop"),
    ],
)
def test_a_canvas_is_kept_as_far_as_it_is_right(regex, canvas, end, room, kept, added, reason, begin, ids):
    """And what can only follow is added."""
    grammar = begin({"regex": regex}, stop_token_ids=[STOP])
    for _ in range(2):  # nothing changes
        assert grammar.fitted(ids(canvas)[:room], end, room) == (
            ids(kept),
            [token for each in added for token in ids(each)],
            reason,
        )


def test_a_canvas_that_begins_wrongly_is_a_fault_of_ours(begin, ids):
    with pytest.raises(RequestError, match="a canvas begins with a token that was not allowed there") as raised:
        begin({"regex": "[ab]+"}).fitted(ids("c"), None, 9)
    assert raised.value.code == "INTERNAL"


def test_white_space_in_json_is_what_people_write(begin, ids):
    def kept(text: str) -> bool:
        return begin({"json": ANSWER}).fitted(ids(text), EOS, 99) == (ids(text), [], "stop")

    for indent in (None, 0, 2, 4):
        assert kept(json.dumps({"answer": 42}, indent=indent))
    assert kept(json.dumps({"answer": 42}, separators=(",", ":")))
    assert not kept('{"answer":  42}')
    assert not kept('{"answer":\n\n42}')


@pytest.fixture(scope="module")
def llm(engine_dir) -> LLM:
    return LLM(engine_dir, max_sequences=3)


def ask(llm: LLM, question: str, structure: dict | None, *, thinking: bool = False, tools=None, **choices):
    config = SamplingConfig(**{"seed": 1, "max_tokens": 96, "structured_outputs": structure, **choices})
    kwargs = {"enable_thinking": thinking}
    [answer] = llm.chat([{"role": "user", "content": question}], config, chat_template_kwargs=kwargs, tools=tools)
    return answer


SUM, COUNT, WEATHER = "What is 17 + 25?", "Count from 3 to 30.", "What is the weather in ulm?"


@pytest.mark.parametrize(
    "structure",
    [{"regex": "[0-9]+"}, {"choice": ["41", "42", "43"]}, {"json": {"type": "integer"}}, {"grammar": "start: /4./"}],
    ids=str,
)
@pytest.mark.parametrize("thinking", [False, True])
def test_what_the_model_writes_rightly_costs_no_step(structure, thinking, llm):
    """Thoughts are free."""
    free = ask(llm, SUM, None, thinking=thinking)
    held = ask(llm, SUM, structure, thinking=thinking)
    assert (held.text, held.reasoning, held.num_steps, held.finish_reason) == ("42", free.reasoning, free.num_steps, "stop")
    assert bool(held.reasoning) == thinking


def test_a_right_answer_of_several_canvases(llm):
    numbers = " ".join(str(number) for number in range(3, 31))
    for regex in (r"[0-9 ]+", r"([0-9]+ )*17 18( [0-9]+)*"):
        held = ask(llm, COUNT, {"regex": regex})
        assert (held.text, held.finish_reason) == (numbers, "stop")
        assert held.num_steps == ask(llm, COUNT, None).num_steps


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": r"It is [0-9]{1,3}\."}, r"It is [0-9]{1,3}\."),
        ({"json": ANSWER}, r'\{\s*"answer"\s*:\s*-?[0-9]+\s*\}'),
        ({"json": json.dumps({"enum": ["grün", "rot", 3]})}, '"grün"|"rot"|3'),
        ({"grammar": 'start: "a" part "c"\npart: "b" | "bb"'}, "abb?c"),
    ],
    ids=str,
)
def test_an_answer_is_a_text_of_its_grammar(structure, pattern, llm):
    """Also where the model, which knows nothing of it, would write another."""
    answer = ask(llm, SUM, structure)
    assert re.fullmatch(pattern, answer.text) and answer.finish_reason == "stop"


def test_a_call_may_stand_for_the_answer_of_a_chat_with_tools(llm):
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tools = [{"type": "function", "function": function}]
    answer = ask(llm, WEATHER, {"json_object": True}, tools=tools)
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("weather", '{"city": "ulm"}')]
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")
    without = ask(llm, WEATHER, {"choice": ["rain", "sun"]})
    assert without.text in ("rain", "sun") and not without.tool_calls
    config = SamplingConfig(seed=1, structured_outputs={"choice": ["rain", "sun"]})
    [forced] = llm.chat([{"role": "user", "content": WEATHER}], config, tools=tools, tool_choice="required")
    assert forced.tool_calls == answer.tool_calls  # which is held to its own grammar


def test_max_tokens_cuts_an_answer_in_the_middle(llm):
    answer = ask(llm, SUM, {"regex": "The answer: [0-9]+"}, max_tokens=7)
    assert (len(answer.token_ids), answer.finish_reason) == (7, "length")
    assert "The answer: 42".startswith(answer.text)


def test_log_probabilities_are_those_of_what_was_allowed(llm):
    """The model, sure of 42, must choose among others; what can only follow is certain."""
    answer = ask(llm, SUM, {"choice": ["70 miles", "90 miles"]}, logprobs=True, top_logprobs=2)
    more = ask(llm, SUM, {"choice": ["70 miles", "90 miles"]}, logprobs=True, top_logprobs=20)
    assert {llm.tokenizer.id_to_token(token) for token, _ in more.top_logprobs[0]} == {"7", "9", "<0x37>", "<0x39>"}
    assert answer.text in ("70 miles", "90 miles")
    assert len(answer.logprobs) == len(answer.top_logprobs) == len(answer.token_ids)
    best, other = (llm.tokenizer.id_to_token(token) for token, _ in answer.top_logprobs[0])
    assert {best, other} <= {"7", "9", "<0x37>", "<0x39>"}
    assert sum(np.exp(value) for _, value in answer.top_logprobs[0]) > 0.5
    assert answer.logprobs[-1] == 0.0 and answer.top_logprobs[-1] == [(answer.token_ids[-1], 0.0)]


def test_end_of_sequence_tokens_that_are_ignored_end_nothing(llm):
    """The grammar's end does."""
    answer = ask(llm, SUM, {"regex": "[0-9]{5}"}, ignore_eos=True)
    assert len(answer.text) == 5 and answer.text.isdigit() and answer.finish_reason == "stop"
    assert ask(llm, SUM, {"regex": "[0-9]+"}, ignore_eos=True, max_tokens=40).finish_reason == "length"


def test_an_empty_answer_is_one_if_the_grammar_has_it(engine_dir):
    """Its last canvas is committed, of which nothing is kept."""
    session = Session.load(engine_dir)
    tokenizer = Tokenizer.from_file(str(engine_dir / "tokenizer.json"))
    defaults = GenerationDefaults.from_json(engine_dir / "generation_config.json")
    llm = LLM.from_engine(Engine(session, tokenizer, defaults, EngineLimits(max_sequences=1, commit_last=True)))
    config = SamplingConfig(structured_outputs={"regex": "a*"}, stop_token_ids=[STOP], logit_bias={STOP: 100}, seed=1)
    for _ in range(2):
        [answer] = llm.generate([[20, 21]], config)
        assert (answer.token_ids, answer.finish_reason, len(answer.num_steps)) == ([], "stop", 1)
        llm._engine.scheduler.tick()
        assert llm._engine.scheduler.is_idle


def test_pieces_and_drafts_follow_the_grammar(llm):
    config = SamplingConfig(seed=1, max_tokens=96, structured_outputs={"regex": "It was ([0-9]+ )*and more, then none\\."})
    pieces = list(llm.stream_chat([{"role": "user", "content": COUNT}], config, draft_interval_s=0))
    final = "".join(piece.text for piece in pieces if not piece.is_draft)
    assert re.match("It was [0-9 ]*", final)
    done = ""
    for piece in pieces:
        assert re.match("(It was [0-9 ]*.*|It.{0,5}|I|)$", done + piece.text)
        done += "" if piece.is_draft else piece.text


def test_a_draft_that_the_grammar_cannot_read_ends_nothing(llm, ids, monkeypatch):
    """It has too many readings; the finished canvas has one."""
    loop = llm._engine.scheduler._loop
    canvases = {1: ids("a" * 32), 2: [*ids("a"), *[EOS] * 31]}  # by the number of steps
    monkeypatch.setattr(loop, "argmax_canvas", lambda slot: canvases[loop.num_steps(slot)])
    grammar = {"grammar": 'start: s\ns: s s s s | s s s | s s | "a" | ""'}
    config = SamplingConfig(structured_outputs=grammar, max_denoising_steps=2, seed=1)
    [piece] = llm.stream([5, 6], config, draft_interval_s=0)
    assert (piece.text, piece.finish_reason) == ("a", "stop")


def test_an_answer_is_the_same_beside_others(llm):
    structures = [{"regex": "[a-d ]{20,}[e-h]{3}"}, None, {"json": ANSWER}, {"choice": ["yes", "no"]}, {"regex": "[0-9]{9}"}]
    chats = [[{"role": "user", "content": SUM}]] * 5
    configs = [SamplingConfig(seed=7, max_tokens=70, structured_outputs=structure) for structure in structures]
    together = llm.chat(chats, configs)
    for chat, config, answer in zip(chats, configs, together, strict=True):
        assert llm.chat([chat], config) == [answer]
    assert [answer.finish_reason for answer in together[1:]] == ["stop"] * 4


def test_positions_are_counted_to_the_last_canvas(llm):
    """It may begin before the last token, wherever the canvases before it were cut."""
    model = llm._engine.session.manifest.model
    most = model.max_position_embeddings
    prompt = [5] * (most - model.canvas_length)
    message = (
        f"prompt: got {len(prompt)} tokens and max_tokens 2, which is canvases of {model.canvas_length}, the last of which may "
        f"begin before the last token, so {most + 1} positions, expected at most {most} in all; lower max_tokens to 1, or "
        "shorten the prompt"
    )
    config = SamplingConfig(max_tokens=2, structured_outputs={"regex": "[0-9]+"})
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        llm.generate([prompt], config)

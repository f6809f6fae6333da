"""Images in `LLM`, with the network uncompiled: drawn figures that the tiny checkpoint answers about, and what is refused."""

import io
import itertools

import pytest
from rich.console import Console
from small_checkpoints import TINY, network_session
from tiny_figures import figure_questions
from tokenizers import Tokenizer
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from typer.testing import CliRunner

from backend import LLM, RequestError, SamplingConfig
from backend.__main__ import app
from backend.chat.template import ChatTemplate
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults
from backend.terminal_chat import TerminalChat

FIGURES = list(itertools.islice(figure_questions(7, held_out=True), 6))
GREEDY = SamplingConfig(temperature=0.0, seed=1)


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    defaults = GenerationDefaults.from_json(TINY / "generation_config.json")
    made = LLM.from_engine(Engine(network_session(TINY), tokenizer, defaults, EngineLimits()))
    made._template = ChatTemplate.load(TINY, tokenizer)
    return made


def prompt_of(question, chat_tokenizer) -> str:
    return chat_tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)


def test_chats_with_images_are_one_batch(llm):
    answers = llm.chat([question.messages for question, _ in FIGURES], GREEDY, images=[[image] for _, image in FIGURES])
    assert [answer.text for answer in answers] == [question.answer for question, _ in FIGURES]


def test_one_chat_and_its_prompt_and_a_stream_give_the_same(llm, chat_tokenizer):
    question, image = FIGURES[0]
    prompt = prompt_of(question, chat_tokenizer)
    [chat] = llm.chat(question.messages, GREEDY, images=[image])
    [raw] = llm.generate(prompt, GREEDY, images=[image])
    [listed] = llm.generate([prompt], GREEDY, images=[[image]])
    streamed = "".join(piece.text for piece in llm.stream_chat(question.messages, GREEDY, images=[image]))
    piped = "".join(piece.text for piece in llm.stream(prompt, GREEDY, images=[image]))
    assert chat.text == raw.text == listed.text == streamed == piped == question.answer
    [num_soft_tokens] = Gemma4ImageProcessorPil(max_soft_tokens=70)(image)["num_soft_tokens_per_image"]
    expected = len(chat_tokenizer(prompt, add_special_tokens=False).input_ids) + num_soft_tokens + 1
    assert chat.num_prompt_tokens == raw.num_prompt_tokens == expected


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "image: got 0 images, expected 1"),
        ([FIGURES[0][1]] * 2, "image: got 2 images, expected 1"),
        ([b"hello"], "image[0]: got 5 bytes that are no image"),
        (["https://example.com/a.png"], "image[0]: got a URL, but this server fetches none"),
    ],
)
def test_images_that_are_refused(llm, images, words):
    with pytest.raises(RequestError) as caught:
        llm.chat(FIGURES[0][0].messages, images=images)
    assert str(caught.value).startswith(words)


def test_prompts_and_lists_of_images_must_be_as_many(llm):
    with pytest.raises(RequestError, match="images: got 1 lists of images, expected 2, one a prompt"):
        llm.generate(["a", "b"], images=[[]])


def test_images_in_the_terminal_chat(llm, tmp_path):
    """Before its question; the next question is about the same chat; after /new there is no image."""
    (first, image), (second, other) = FIGURES[:2]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, picture in zip(paths, (image, other), strict=True):
        picture.save(path)
    out = io.StringIO()
    asked = [part["text"] for question in (first, second) for part in question.messages[0]["content"] if part["type"] == "text"]
    lines = [f"/image {paths[0]}", asked[0], "/new", f"/image {paths[1]}", asked[1], "/image nothing.png", asked[0], "/quit"]
    TerminalChat(llm, Console(file=out, width=200), GREEDY, {}).run(lines)
    attached = "1 for the next question"
    *answered, refused = out.getvalue().splitlines()
    assert answered == [attached, first.answer, attached, second.answer, attached]
    assert refused == "error: image[1]: nothing.png cannot be read (No such file or directory), expected the file of an image"


def test_the_generate_command_asks_about_an_image(llm, tmp_path, monkeypatch, capsys):
    question, image = FIGURES[2]
    image.save(tmp_path / "a.png")
    monkeypatch.setattr("backend.LLM", lambda engine: llm)
    [text] = [part["text"] for part in question.messages[0]["content"] if part["type"] == "text"]
    options = [
        "--engine",
        "unread",
        "--chat",
        "--image",
        str(tmp_path / "a.png"),
        "--sampling",
        '{"temperature": 0, "seed": 1}',
    ]
    result = CliRunner().invoke(app, ["generate", text, *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == question.answer

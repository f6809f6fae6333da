"""Images in `LLM`, with the network uncompiled: drawn figures that the tiny checkpoint answers about, and what is refused."""

import io
import itertools
from pathlib import Path

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
        (
            ["no such file.png"],
            "image[0]: got malformed base64 (Only base64 data is allowed), expected a Pillow image, an existing file (text or",
        ),
        ([None], "image[0]: got NoneType, expected a Pillow image, an existing file (text or pathlib.Path), the bytes of one"),
        (FIGURES[0][1], "images: got Image, expected a list of images; put one alone into a list"),
        ("a.png", "images: got str, expected a list of images"),
        (Path("a.png"), "images: got PosixPath, expected a list of images"),
    ],
)
def test_images_that_are_refused(llm, images, words):
    for ask in (llm.chat, llm.stream_chat):
        with pytest.raises(RequestError) as caught:
            ask(FIGURES[0][0].messages, images=images)
        assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_prompts_and_lists_of_images_must_be_as_many(llm):
    with pytest.raises(RequestError, match="images: got 1 lists of images, expected 2, one a prompt"):
        llm.generate(["a", "b"], images=[[]])
    with pytest.raises(RequestError, match="images: got Image, expected 2 lists of images, one a prompt"):
        llm.generate(["a", "b"], images=FIGURES[0][1])
    with pytest.raises(RequestError, match="images: got Image, expected a list of images; put one alone into a list"):
        llm.generate(["a", "b"], images=[FIGURES[0][1]] * 2)


def test_a_text_may_name_a_file_but_not_within_a_message(llm, tmp_path):
    question, image = FIGURES[0]
    path = str(tmp_path / "a.png")
    image.save(path)
    [answer] = llm.chat(question.messages, GREEDY, images=[path])
    streamed = "".join(piece.text for piece in llm.stream_chat(question.messages, GREEDY, images=[path]))
    assert answer.text == streamed == question.answer
    with pytest.raises(RequestError, match=r"image\[0\]: got malformed base64"):
        llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": path}}]}])


def test_images_in_the_terminal_chat(llm, tmp_path):
    """Before its question; the next question is about the same chat; after /new there is no image."""
    (first, image), (second, other) = FIGURES[:2]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, picture in zip(paths, (image, other), strict=True):
        picture.save(path)
    out, notes = io.StringIO(), io.StringIO()
    asked = [part["text"] for question in (first, second) for part in question.messages[0]["content"] if part["type"] == "text"]
    lines = [f"/image {paths[0]}", asked[0], "/new", f"/image {paths[1]}", asked[1], "/image nothing.png", asked[0], "/quit"]
    consoles = [Console(file=file, width=20) for file in (out, notes)]
    assert not TerminalChat(llm, consoles[0], GREEDY, notes=consoles[1]).run(lines)
    assert out.getvalue().splitlines() == [first.answer, second.answer]
    *attached, refused = notes.getvalue().splitlines()
    assert attached == ["1 picture for the next question"] * 3
    assert refused == "error: image[1]: nothing.png cannot be read (No such file or directory), expected the file of an image"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/dev/zero", "/dev/zero cannot be read (is a device, expected a file)"),
        ("~nobody_has_this_name/a.png", "~nobody_has_this_name/a.png cannot be read (No such file or directory)"),
        ("a\0.png", r"a\x00.png cannot be read (embedded null byte)"),
    ],
)
def test_a_picture_that_is_none_does_not_end_the_terminal_chat(llm, path, line):
    consoles = [Console(file=io.StringIO(), width=20) for _ in range(2)]
    assert not TerminalChat(llm, consoles[0], GREEDY, notes=consoles[1]).run([f"/image {path}", "asked", "/nonsense"])
    refused, after = consoles[1].file.getvalue().splitlines()[1:]
    assert refused == f"error: image[0]: {line}, expected the file of an image"
    assert after.startswith("error: got '/nonsense'")


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

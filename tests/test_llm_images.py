"""Images in `LLM`, with the network uncompiled: drawn figures that the tiny checkpoint answers about, and what is refused."""

import itertools

import pytest
from small_checkpoints import TINY, network_session
from tiny_figures import figure_questions
from tokenizers import Tokenizer
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from backend import LLM, RequestError, SamplingConfig
from backend.chat.template import ChatTemplate
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults

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

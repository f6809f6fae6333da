"""Prompts with images: whole generations against transformers, chunks that cut no image, the prefix cache, who waits."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import Oracle
from PIL import Image
from small_checkpoints import TINY, VISION, network_session, random_checkpoint
from test_scheduler import DEFAULTS, Sent, run
from test_vision import picture
from tokenizers import Tokenizer
from tolerances import assert_close

from backend.encode_budget import share_encode_budget
from backend.engine import Engine, EngineLimits
from backend.errors import RequestError
from backend.images.placeholders import expand
from backend.images.preprocess import preprocess
from backend.metrics import Series
from backend.sampling_config import SamplingConfig
from backend.scheduler import Scheduler

BUDGET, IMAGE = 70, 90  # soft tokens of an image; its placeholder's token
WIDE, HIGH, SMALL = picture(400, 60), picture(50, 170, seed=1), picture(20, 20, seed=2)
TEXT = list(range(20, 60))
PROMPTS = {
    "before text": ([IMAGE, *TEXT], [WIDE]),
    "after text": ([*TEXT, IMAGE], [HIGH]),
    "between": ([*TEXT, IMAGE, *TEXT[::-1]], [WIDE]),
    "several": ([5, IMAGE, *TEXT[:3], IMAGE, *TEXT[:30], IMAGE, 6], [WIDE, HIGH, SMALL]),
    "one behind the other": ([5, IMAGE, IMAGE, 6], [SMALL, WIDE]),
    "alone": ([IMAGE], [HIGH]),
    "none": (TEXT, []),
}
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("random"), seed=8, vision=VISION)


@pytest.fixture(scope="module")
def oracle(checkpoint) -> Oracle:
    return Oracle(checkpoint)


def scheduler_of(checkpoint, *, max_encode_tokens: int = 256, **limits) -> Scheduler:
    session = network_session(checkpoint, page_size=8, max_encode_tokens=max_encode_tokens)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return Engine(session, tokenizer, DEFAULTS, EngineLimits(**limits)).scheduler


def add(scheduler: Scheduler, prompt: list[int], images: list[Image.Image], *, budget: int = BUDGET, **sampling) -> Sent:
    model = scheduler._session.manifest.model
    resolved = SamplingConfig(**{"seed": 1, "max_tokens": MAX_TOKENS, **sampling}).resolve(DEFAULTS)
    patches = [preprocess(image, budget, model.vision) for image in images]
    sent, expanded = Sent(), expand(prompt, patches, model)
    scheduler.check(expanded, resolved, images=patches)
    scheduler.add(expanded, resolved, sent, images=patches)
    return sent


def generated(checkpoint, *prompts: tuple[list[int], list[Image.Image]], **choices) -> list[Sent]:
    scheduler = scheduler_of(checkpoint, **choices)
    sent = [add(scheduler, *prompt) for prompt in prompts]
    run(scheduler)
    return sent


def of_transformers(oracle: Oracle, model, prompt: list[int], images: list[Image.Image]) -> list[int]:
    ids = expand(prompt, [preprocess(image, BUDGET, model.vision) for image in images], model)
    more = oracle.image_inputs(ids, images, BUDGET) if images else {}
    canvases = oracle.generate(
        ids, seed=1, max_new_tokens=MAX_TOKENS, max_denoising_steps=4, eos_token_id=None, pad_token_id=None, **more
    )
    return canvases.token_ids(max_tokens=MAX_TOKENS, ends=set())


@pytest.mark.parametrize("max_encode_tokens", [256, 72])  # of 40 to 160 tokens with the images: in one pass, and in chunks
def test_generations_equal_transformers(checkpoint, oracle, max_encode_tokens):
    """All of them in one batch."""
    sent = generated(checkpoint, *PROMPTS.values(), max_encode_tokens=max_encode_tokens)
    model = network_session(checkpoint).manifest.model
    for name, prompt, each in zip(PROMPTS, PROMPTS.values(), sent, strict=True):
        assert each.token_ids == of_transformers(oracle, model, *prompt), name
    assert len({tuple(each.token_ids) for each in sent}) == len(PROMPTS)  # none is blind


def test_a_compiled_engine_equals_transformers(engine_dir):
    """Features, and the answer to a chat about two images."""
    engine, oracle = Engine.load(engine_dir, EngineLimits()), Oracle(TINY)
    model, images = engine.session.manifest.model, [picture(100, 90), picture(60, 150)]
    patches = [preprocess(image, BUDGET, model.vision) for image in images]
    for image, each in zip(images, patches, strict=True):
        assert_close(engine.session.vision(each), oracle.image_features(image, BUDGET), torch.float32)
    text = "<bos><|turn>user\n<|image|>What is<|image|>2 and 3<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    ids, sent = expand(engine.tokenize(text), patches, model), Sent()
    sampling = SamplingConfig(seed=1, max_tokens=MAX_TOKENS).resolve(engine.defaults)
    engine.scheduler.check(ids, sampling, images=patches)
    engine.scheduler.add(ids, sampling, sent, images=patches)
    run(engine.scheduler)
    inputs = oracle.image_inputs(ids, images, BUDGET)
    expected = oracle.generate(ids, seed=1, max_new_tokens=MAX_TOKENS, pad_token_id=None, **inputs)
    assert sent.token_ids == expected.token_ids(max_tokens=MAX_TOKENS, ends=set(engine.defaults.eos_token_ids))
    assert [output.num_steps for output in sent.outputs] == expected.num_steps


def test_an_encoder_that_sees_images_as_text_does_too(tmp_path):
    checkpoint = random_checkpoint(tmp_path, seed=8, vision=VISION, use_bidirectional_attention=None)
    oracle, prompt = Oracle(checkpoint), PROMPTS["between"]
    model = network_session(checkpoint).manifest.model
    assert not model.bidirectional_images
    [sent] = generated(checkpoint, prompt)
    assert sent.token_ids == of_transformers(oracle, model, *prompt)


def test_no_pass_cuts_an_image(checkpoint):
    """A long prompt with images between others: every pass has the tokens of an image all or not at all."""
    scheduler = scheduler_of(checkpoint, max_encode_tokens=96)
    add(scheduler, [*TEXT, IMAGE, *TEXT, IMAGE, IMAGE, *TEXT], [WIDE, HIGH, SMALL])
    add(scheduler, [*TEXT[::-1], *TEXT, IMAGE], [HIGH])
    vision = scheduler._session.manifest.model.vision
    sizes = [preprocess(each, BUDGET, vision).num_soft_tokens for each in (WIDE, HIGH, SMALL, HIGH)]
    passes, encode = [], scheduler._session.encode

    def recorded(token_ids, *arguments):
        passes.append(token_ids.tolist())
        return encode(token_ids, *arguments)

    with mock.patch.object(scheduler._session, "encode", recorded):
        run(scheduler)
    assert max(map(len, passes)) <= 96
    runs = ["".join("i" if token == IMAGE else "." for token in each).split(".") for each in passes]
    assert sorted(len(each) for line in runs for each in line if each) == sorted(sizes)


def test_an_image_larger_than_a_pass_is_refused(checkpoint):
    scheduler = scheduler_of(checkpoint, max_encode_tokens=48)
    with pytest.raises(RequestError) as refused:
        add(scheduler, [IMAGE, 5], [picture(100, 100)])
    assert str(refused.value) == (
        "images: got one of 64 soft tokens, expected at most 48, the tokens of one encode pass; "
        "lower image_soft_tokens, or rebuild the engine with a larger --max-encode-tokens"
    )
    assert refused.value.code == "INVALID_ARGUMENT"


def test_the_prefix_cache_tells_images_apart(checkpoint):
    """The same tokens and another image: nothing behind the image is taken over. The same image is not looked at again."""
    first, second = picture(100, 100, seed=3), picture(100, 100, seed=4)
    prompt = [*TEXT, IMAGE, *TEXT]
    alone = {name: generated(checkpoint, (prompt, [image]))[0].token_ids for name, image in (("a", first), ("b", second))}
    assert alone["a"] != alone["b"]
    scheduler = scheduler_of(checkpoint)
    seen, hits = [], []
    vision = scheduler._session.vision

    def recorded(image):
        seen.append(image.digest)
        return vision(image)

    with mock.patch.object(scheduler._session, "vision", recorded):
        for name, image in (("a", first), ("b", second), ("a", first)):
            sent = add(scheduler, prompt, [image])
            run(scheduler)
            assert sent.token_ids == alone[name]
            counters = scheduler.metrics.drain().counters
            hits.append(counters.get(Series("prefix_cache_hit_tokens_total"), 0))
    # 40 tokens before the image; then all 146 but those of the page that is not full.
    assert hits == [0, 40, 144]
    assert len(seen) == 2 and seen[0] != seen[1]


@pytest.mark.parametrize(
    ("left", "since", "images", "shares"),
    [
        ([100], [0], [[(4, 20)]], [4]),  # up to before the image
        ([96], [0], [[(0, 16)]], [16]),  # which then goes alone, larger than the pass was meant
        ([100], [0], [[(2, 8)]], [8]),  # one that fits
        ([100, 3], [0, 1], [[(0, 6)], []], [6, 2]),  # what it leaves
        ([100, 3], [0, 1], [[(0, 9)], []], [9, 0]),
        ([80, 90], [1, 0], [[(3, 9)], [(0, 5)]], [3, 5]),
        ([7, 90], [1, 0], [[(0, 7)], []], [0, 8]),  # an image that is not the oldest's waits until it is
    ],
)
def test_shares_of_a_pass_with_images_by_hand(left, since, images, shares):
    assert share_encode_budget(left, since, 8, images) == shares


@given(data=st.data())
def test_every_row_gets_on_and_no_image_is_cut(data):
    """Rows of random text and images, until none has anything left; each pass takes some."""
    budget = data.draw(st.integers(1, 20))
    pieces = st.lists(st.tuples(st.booleans(), st.integers(1, 20)), min_size=1, max_size=5)
    rows = [list(row) for row in data.draw(st.lists(pieces, min_size=1, max_size=4))]
    images, left = [], []
    for row in rows:
        ends = [sum(length for _, length in row[: index + 1]) for index in range(len(row))]
        images.append([(end - length, end) for (is_image, length), end in zip(row, ends, strict=True) if is_image])
        left.append(ends[-1])
    done, most_passes = [0] * len(rows), sum(left)
    for _ in range(most_passes):
        waiting = [row for row in range(len(rows)) if done[row] < left[row]]
        if not waiting:
            break
        ahead = [[(start - done[row], end - done[row]) for start, end in images[row] if start >= done[row]] for row in waiting]
        shares = share_encode_budget([left[row] - done[row] for row in waiting], waiting, budget, ahead)
        oldest_image = next((end for start, end in ahead[0] if start == 0), 0)
        assert shares[0] > 0 and sum(shares) <= max(budget, oldest_image)
        for row, share in zip(waiting, shares, strict=True):
            done[row] += share
            assert not any(start < done[row] < end for start, end in images[row])
    assert done == left

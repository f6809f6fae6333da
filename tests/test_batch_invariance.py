"""What a batch-invariant engine does otherwise, on the CPU; `test_batch_invariance_cuda.py` has what comes of it."""

from random import Random

import pytest
import torch
from small_checkpoints import TINY, network_session, random_checkpoint, random_image
from tokenizers import Tokenizer
from typer.testing import CliRunner

from backend.admission import check_images
from backend.batch_invariance import check_batch_invariance
from backend.encode_budget import most_in_one_pass, share_encode_budget
from backend.engine import Engine, EngineLimits
from backend.errors import RequestError
from backend.generation_defaults import GenerationDefaults
from backend.images.placeholders import expand
from backend.kv_cache import PagedKVCache
from backend.sampling_config import SamplingConfig
from builder.__main__ import app
from builder.batch_invariance import check_batch_invariant
from builder.config import read_model_config
from builder.errors import BuildError
from contract.manifest import BuildConfig, ManifestError
from plugins.batch_invariance import CUT_TOKENS, PASS_ROWS

DEFAULTS = GenerationDefaults.from_json({"max_denoising_steps": 2, "eos_token_id": []})


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    checkpoint = random_checkpoint(tmp_path_factory.mktemp("random"), canvas_length=PASS_ROWS)
    return network_session(checkpoint, page_size=32, max_encode_tokens=3 * PASS_ROWS, batch_invariant=True)


# -- Shares of a pass


@pytest.mark.parametrize(
    ("left", "budget", "uncut", "shares"),
    [
        ([1000], 300, [()], [256]),
        ([1000], 40, [()], [64]),  # at least to the first place
        ([30], 300, [()], [30]),
        ([1000, 50, 70], 300, [(), (), ()], [128, 50, 70]),
        ([1000, 50, 100], 300, [(), (), ()], [128, 50, 100]),
        ([1000, 50, 200], 300, [(), (), ()], [128, 50, 64]),
        ([1000, 256, 20], 512, [(), [(0, 256)], ()], [256, 256, 0]),  # a canvas before a short prompt
        ([1000, 256], 400, [(), [(0, 256)]], [384, 0]),  # for which there is no room
        ([256, 1000], 400, [[(0, 256)], ()], [256, 128]),
        ([1000], 300, [[(100, 380)]], [64]),  # before the image, and the tokens that would be cut off with it
        ([1000], 300, [[(30, 310)]], [320]),
        ([1000], 300, [[(30, 310), (312, 400)]], [448]),
        ([1000], 900, [[(30, 310), (450, 700)]], [896]),
        ([1000], 640, [[(130, 310), (320, 700)]], [320]),
        ([1000], 640, [[(130, 310), (312, 700)]], [128]),
    ],
    ids=str,
)
def test_shares_of_a_pass_by_hand(left, budget, uncut, shares):
    assert share_encode_budget(left, range(len(left)), budget, uncut, CUT_TOKENS) == shares


@pytest.mark.parametrize("seed", range(50))
def test_rows_are_cut_where_they_may_be_and_come_to_their_end(seed):
    random = Random(seed)
    lengths = [random.randrange(1, 900) for _ in range(6)]
    images = [sorted((start, start + random.randrange(1, 280)) for start in random.sample(range(900), 2)) for _ in lengths]
    images = [
        [(first, min(end, second)) for (first, end), second in zip(each, (each[1][0], 900), strict=True)] for each in images
    ]
    images = [[(a, min(b, length)) for a, b in each if a < length] for each, length in zip(images, lengths, strict=True)]
    done, passes = [0] * len(lengths), 0
    while done != lengths:
        waiting = [row for row, length in enumerate(lengths) if done[row] < length]
        ahead = [[(a - done[row], b - done[row]) for a, b in images[row] if a >= done[row]] for row in waiting]
        left = [lengths[row] - done[row] for row in waiting]
        shares = share_encode_budget(left, waiting, 256, ahead, CUT_TOKENS)
        assert shares[0] and sum(shares) <= max(256, shares[0])
        for row, share in zip(waiting, shares, strict=True):
            done[row] += share
            assert done[row] == lengths[row] or done[row] % CUT_TOKENS == 0
            assert not any(a < done[row] < b for a, b in images[row])
        passes += 1
    assert passes <= 6 * 900 / CUT_TOKENS


@pytest.mark.parametrize(
    ("images", "most"),
    [
        ([], 0),
        ([(64, 128)], 64),
        ([(63, 129)], 192),
        ([(30, 310), (312, 400)], 448),
        ([(30, 310), (320, 400)], 320),  # and then 128
        ([(30, 310), (800, 990)], 320),
        ([(900, 990)], 104),  # to the end
    ],
    ids=str,
)
def test_what_goes_in_one_pass_by_hand(images, most):
    build = BuildConfig(target="inductor", dtype="bfloat16", batch_invariant=True)
    assert most_in_one_pass(1000, images, build) == most
    done, passes = 0, []
    while images and done < 1000:  # each as small as it may be
        ahead = [(start - done, end - done) for start, end in images if start >= done]
        passes += share_encode_budget([1000 - done], [0], 1, [ahead], CUT_TOKENS)
        done += passes[-1]
    assert max(passes, default=0) == most


def test_images_that_no_pass_takes_together_are_refused(session):
    """Where a prompt could be cut, one of them would be."""
    manifest = session.manifest.model_copy(update={"model": read_model_config(TINY)})
    images = [random_image(200, manifest.model.vision)] * 4
    placeholder, text = manifest.model.image_token_id, [20] * CUT_TOKENS
    for prompt in ([placeholder] * 3, [placeholder, *text, *[placeholder] * 3]):
        count = prompt.count(placeholder)
        check_images(manifest, expand(prompt, images[:count], manifest.model), images[:count])
    with pytest.raises(RequestError) as refused:
        check_images(manifest, expand([placeholder] * 4, images, manifest.model), images)
    assert str(refused.value) == (
        "images: got 808 tokens of images that a batch-invariant engine cannot encode apart, expected at most 768, the tokens "
        "of one encode pass; put 64 tokens of text between them, lower image_soft_tokens, or rebuild the engine with a larger "
        "--max-encode-tokens"
    )


# -- Passes


@pytest.fixture
def passes(monkeypatch, session):
    """Of each encode pass its rows, and of each of its sequences how many tokens are cached and how many are new."""
    seen, encode = [], type(session).encode

    def record(self, token_ids, positions, starts, lengths, *others):
        new = [end - start for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
        seen.append((len(token_ids), list(zip(lengths.tolist(), new, strict=True))))
        return encode(self, token_ids, positions, starts, lengths, *others)

    monkeypatch.setattr(type(session), "encode", record)
    return seen


def test_passes_are_whole_and_prompts_are_cut_and_shared_at_multiples(session, passes):
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    scheduler = Engine(session, tokenizer, DEFAULTS, EngineLimits(max_sequences=4)).scheduler
    common = torch.randint(20, 97, (500,), generator=torch.Generator().manual_seed(0)).tolist()

    def answer(prompt: list[int], max_tokens: int) -> list[int]:
        outputs = []
        scheduler.add(prompt, SamplingConfig(seed=1, max_tokens=max_tokens).resolve(DEFAULTS), outputs.append)
        while not scheduler.is_idle:
            scheduler.tick()
        assert not any(isinstance(each, RequestError) for each in outputs)
        return [token for each in outputs for token in each.token_ids]

    first = answer(common[:470], 600)  # three canvases, two of which are read
    assert [rows for rows, _ in passes] == [512, 256, 256]
    assert [cached for _, sequences in passes for cached, _ in sequences] == [0, 470, 726]
    passes.clear()
    answer(common[:470] + first + [30], 10)  # shares the prompt, at 448, and no answer
    assert passes[0][1][0][0] == 448
    assert sum(new for _, sequences in passes for _, new in sequences) >= 600 + 23
    passes.clear()
    answer(common[:470], 10)
    assert passes == [(256, [(448, 256)])]  # of 22 tokens; the others are filler
    for length in (700, 900, 800):
        scheduler.add(
            [length % 70 + 20] * length, SamplingConfig(seed=1, max_tokens=400).resolve(DEFAULTS), lambda output: None
        )
    passes.clear()
    while not scheduler.is_idle:
        scheduler.tick()
    ends = {700, 900, 800, 956, 1156, 1056}
    for rows, sequences in passes:
        assert rows % PASS_ROWS == 0
        for cached, _ in sequences:
            assert cached % CUT_TOKENS == 0 or cached in ends


def test_answers_are_not_kept_for_nobody(session):
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    with pytest.raises(ManifestError, match="commit_last: got true, expected false: a batch-invariant engine keeps no answers"):
        Engine(session, tokenizer, DEFAULTS, EngineLimits(commit_last=True))


# -- What is asked when an engine is loaded


def test_programs_are_asked_and_a_difference_is_told(session, monkeypatch):
    model = session.manifest.model
    cache = PagedKVCache(
        model,
        page_size=32,
        num_pages=dict.fromkeys(model.attention, 8),
        max_sequences=4,
        max_tokens=2048,
        dtype=session.dtype,
        device=session.device,
    )
    session.bind_pages(cache.pages)
    loop = {"batches": (1, 2, 4), "head_rows": 2 * PASS_ROWS}
    check_batch_invariance(session, cache, **loop)
    with pytest.raises(ManifestError, match="got room for 100 rows of logits, expected as many as a canvas has, 256"):
        check_batch_invariance(session, cache, batches=(1,), head_rows=100)
    for program, among in (("encode", 512), ("denoise", 512), ("head", 512)):
        run = getattr(type(session), program)

        def others(self, rows, *inputs, run=run, program=program):
            changed = [*run(self, rows, *inputs)] if program == "encode" else [run(self, rows, *inputs)]
            if rows.shape[0] * (PASS_ROWS if program == "denoise" else 1) > PASS_ROWS:
                changed[-1].view(-1)[-1] += 1  # of the last row alone
            return changed if program == "encode" else changed[0]

        with monkeypatch.context() as patch:
            patch.setattr(type(session), program, others)
            with pytest.raises(ManifestError, match=f"program {program} gives rows among {among} other bits than among 256"):
                check_batch_invariance(session, cache, **loop)


# -- Builds


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"device": "cpu"}, "got device 'cpu', expected 'cuda'"),
        ({"target": "tensorrt"}, "got target 'tensorrt', expected 'inductor'"),
        ({"expert_activations": "float8"}, "got expert_activations 'float8', expected 'full'"),
        ({"max_encode_tokens": 2000}, "got max_encode_tokens 2000, expected a multiple of 256, at least 1280"),
        ({"max_encode_tokens": 1024}, "got max_encode_tokens 1024, expected a multiple of 256, at least 1280"),
        ({"page_size": 48}, "got page_size 48, expected a divisor or a multiple of 64"),
        ({"max_head_rows": 16}, "got max_head_rows 16, expected at least a canvas, 64"),
    ],
    ids=str,
)
def test_what_cannot_be_batch_invariant_is_refused(choices, message):
    model = read_model_config(TINY).model_copy(update={"canvas_length": 64})
    usual = {"target": "inductor", "dtype": "bfloat16", "device": "cuda", "batch_invariant": True}
    check_batch_invariant(BuildConfig(**usual), model)
    with pytest.raises(BuildError, match=f"^batch_invariant: {message}.*; choose another, or leave out --batch-invariant$"):
        check_batch_invariant(BuildConfig(**{**usual, **choices}), model)


def test_the_command_refuses_a_cpu(tmp_path):
    arguments = ["build", str(TINY), str(tmp_path / "engine"), "--batch-invariant", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: batch_invariant: got device 'cpu', expected 'cuda'") and not list(tmp_path.iterdir())

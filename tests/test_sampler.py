"""The sampler against transformers' own schedule, acceptance, stopping and self-conditioning, and values worked out by hand."""

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextScaledWordEmbedding

from backend import sampler

pytestmark = pytest.mark.usefixtures("two_threads_an_operation")

VOCAB_SIZES = (2, 63, 257, 4096)
# The entropy is a sum over the vocabulary of float32 terms whose total is at most ln(V), about 10: a few roundings of it.
ENTROPY_TOLERANCE = {"rtol": 2e-6, "atol": 4e-6}


def random_logits(*shape: int, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def oracle_entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


class Divisor:
    """Stands for the scores given to a logits processor, to see the temperature itself: what it would be divided by."""

    def __truediv__(self, other):
        return other


@pytest.mark.parametrize(("t_min", "t_max"), [(0.4, 0.8), (0.0, 1.0), (0.1, 0.7000000001), (1 / 3, 2 / 3), (0.9, 37.3)])
def test_temperature_schedule_has_the_bits_of_transformers(t_min, t_max):
    cases = [(n, num_steps) for num_steps in (1, 2, 7, 48, 49) for n in range(1, num_steps + 1)]
    schedules = {num_steps: LinearTemperatureScheduleLogitsProcessor(t_min, t_max, num_steps) for _, num_steps in cases}
    expected = torch.stack([schedules[of](None, Divisor(), torch.tensor(n, dtype=torch.int32)) for n, of in cases])
    remaining, num_steps = torch.tensor(cases).unbind(-1)
    bounds = [torch.full((len(cases),), t, dtype=torch.float64) for t in (t_min, t_max)]
    actual = sampler.temperature_schedule(*bounds, remaining, num_steps)
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_temperature_schedule_by_hand():
    """Counting down: t_max at the first step, one N-th of the way above t_min at the last; each row has its own numbers."""
    t_min, t_max = torch.tensor([0.25, 0.25, 0.5]).double(), torch.tensor([0.75, 0.75, 0.5]).double()
    actual = sampler.temperature_schedule(t_min, t_max, torch.tensor([4, 1, 3]), torch.tensor([4, 4, 8]))
    assert actual.tolist() == [0.75, 0.375, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cap(dtype):
    raw = random_logits(3, 63, scale=40).to(dtype)
    before = raw.clone()
    logits = raw.to(torch.float32)
    assert torch.equal(sampler.soft_cap(raw, 30.0), torch.tanh(logits / 30.0) * 30.0)
    uncapped = sampler.soft_cap(raw, None)
    assert torch.equal(uncapped, logits) and uncapped.data_ptr() != raw.data_ptr()
    assert torch.equal(raw, before)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [0.01, 4.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_vocabulary_pass_equals_the_oracle(vocab_size, scale, dtype, cap):
    raw = random_logits(9, vocab_size, scale=scale).to(dtype)
    before = raw.clone()
    temperature = torch.linspace(0.4, 0.8, 9)
    noise = random_logits(9, vocab_size, scale=1.0, seed=1)
    result = sampler.vocabulary_pass(raw, cap=cap, temperature=temperature, noise=noise)

    processed = sampler.soft_cap(raw, cap) / temperature[:, None]
    assert torch.equal(result.processed, processed)
    assert torch.equal(result.argmax, processed.argmax(dim=-1))
    assert torch.equal(result.sampled, (processed + noise).argmax(dim=-1))
    assert (result.entropy >= 0).all()
    torch.testing.assert_close(result.entropy, oracle_entropy(processed.double()).float(), **ENTROPY_TOLERANCE)
    # transformers forms logits - logsumexp first, and so is off by a rounding of the largest logit.
    rounding = torch.finfo(torch.float32).eps * processed.abs().max().item()
    torch.testing.assert_close(result.entropy, oracle_entropy(processed), rtol=2e-6, atol=4e-6 + rounding)
    assert torch.equal(raw, before)

    alone = sampler.vocabulary_pass(raw[4:5], cap=cap, temperature=temperature[4:5], noise=noise[4:5])
    for whole, part in zip(result, alone, strict=True):
        assert torch.equal(whole[4:5], part)


def test_entropy_by_hand():
    """Uniform over V: ln V. One sure token: 0. Probabilities 1/2, 1/4, 1/4: 1.5 ln 2."""
    rows = torch.full((3, 4), -math.inf)
    rows[0] = 3.0
    rows[1, 2] = -1.0
    rows[2, :3] = torch.tensor([0.5, 0.25, 0.25]).log()
    result = sampler.vocabulary_pass(rows, cap=None, temperature=torch.ones(3), noise=None)
    torch.testing.assert_close(result.entropy, torch.tensor([math.log(4), 0.0, 1.5 * math.log(2)]))
    assert result.argmax.tolist() == [0, 2, 0]


def test_small_entropies_keep_their_digits():
    """Two tokens, the second with probability p: p (1 - ln p) to first order, with nothing lost to cancellation."""
    p = 10.0 ** -torch.arange(2, 7)
    rows = torch.stack([torch.zeros(5), p.log()], dim=-1)
    entropy = sampler.vocabulary_pass(rows, cap=None, temperature=torch.ones(5), noise=None).entropy
    q = p.double() / (1 + p.double())
    expected = -(q * q.log() + (1 - q) * (1 - q).log())
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-2, atol=0)


def test_forbidden_tokens_and_no_noise():
    logits = random_logits(5, 63)
    logits[:, ::2] = -math.inf
    temperature = torch.full((5,), 0.5)
    result = sampler.vocabulary_pass(logits, cap=None, temperature=temperature, noise=None)
    torch.testing.assert_close(result.entropy, oracle_entropy(logits / 0.5), **ENTROPY_TOLERANCE)
    assert torch.equal(result.sampled, result.argmax)
    noise = random_logits(5, 63, scale=100.0, seed=1)
    noisy = sampler.vocabulary_pass(logits, cap=None, temperature=temperature, noise=noise)
    assert (noisy.sampled % 2 == 1).all()


@pytest.mark.parametrize("cap", [None, 30.0])
def test_log_probability_of_the_argmax(cap):
    for scale in (0.01, 4.0, 200.0):
        result = sampler.vocabulary_pass(random_logits(9, 257, scale=scale), cap=cap, temperature=torch.ones(9), noise=None)
        torch.testing.assert_close(result.logprob, result.processed.log_softmax(dim=-1).amax(dim=-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_bias_is_added_after_the_cap_before_the_temperature(cap):
    raw, noise = random_logits(9, 63, scale=40), random_logits(9, 63, scale=1.0, seed=1)
    temperature = torch.linspace(0.4, 0.8, 9)
    dense = torch.zeros(9, 63)
    dense[2:5, 7], dense[2:5, 60], dense[8, 0] = 1.5, -100, 100
    bias = [
        sampler.LogitBias(2, 5, torch.tensor([7, 60]), torch.tensor([1.5, -100])),
        sampler.LogitBias(5, 8, torch.tensor([], dtype=torch.int64), torch.tensor([])),
        sampler.LogitBias(8, 9, torch.tensor([0]), torch.tensor([100.0])),
    ]
    result = sampler.vocabulary_pass(raw, cap=cap, temperature=temperature, noise=noise, bias=bias)
    processed = (sampler.soft_cap(raw, cap) + dense) / temperature[:, None]
    assert torch.equal(result.processed, processed)
    assert torch.equal(result.argmax, processed.argmax(dim=-1))
    assert torch.equal(result.sampled, (processed + noise).argmax(dim=-1))
    assert result.entropy.isfinite().all() and result.logprob.isfinite().all()
    torch.testing.assert_close(result.entropy, oracle_entropy(processed.double()).float(), **ENTROPY_TOLERANCE)
    plain = sampler.vocabulary_pass(raw, cap=cap, temperature=temperature, noise=noise)
    for biased, unbiased in zip(result, plain, strict=True):
        assert torch.equal(biased[[0, 1, 5, 6, 7]], unbiased[[0, 1, 5, 6, 7]])


@pytest.mark.parametrize("penalty", [1.5, 0.8])
def test_a_penalty_is_that_of_transformers_and_before_the_bias(penalty):
    raw, temperature = random_logits(9, 63, scale=40), torch.linspace(0.4, 0.8, 9)
    repeated, rows = torch.arange(0, 63, 4), slice(2, 7)
    capped = sampler.soft_cap(raw, 30.0)
    capped[rows] = RepetitionPenaltyLogitsProcessor(penalty)(repeated.expand(5, -1), capped[rows])
    capped[4:8, [4, 5]] += 3.0
    result = sampler.vocabulary_pass(
        raw,
        cap=30.0,
        temperature=temperature,
        noise=None,
        repetitions=[sampler.Repetition(2, 7, repeated, penalty)],
        bias=[sampler.LogitBias(4, 8, torch.tensor([4, 5]), torch.tensor([3.0, 3.0]))],
    )
    assert torch.equal(result.processed, capped / temperature[:, None])


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9])
def test_blocks_of_rows_change_nothing(num_rows, monkeypatch):
    """The smallest blocks against one of everything, with a bias and a penalty that begin and end within blocks."""
    raw, noise, temperature = random_logits(num_rows, 257), random_logits(num_rows, 257, seed=1), torch.full((num_rows,), 0.7)
    bias = [sampler.LogitBias(num_rows // 3, num_rows - 1, torch.tensor([3, 250]), torch.tensor([9.0, -9.0]))]
    repetitions = [sampler.Repetition(num_rows // 2, num_rows, torch.tensor([4, 251]), 2.0)]
    processing = {"cap": 30.0, "temperature": temperature, "repetitions": repetitions, "bias": bias}
    of_one = sampler.vocabulary_pass(raw, noise=noise, **processing)
    monkeypatch.setattr(sampler, "_CPU_BLOCK_LOGITS", 1)
    of_many = sampler.vocabulary_pass(raw, noise=noise, **processing)
    for whole, blocks in zip(of_one, of_many, strict=True):
        assert torch.equal(whole, blocks)


def test_equal_logits_give_the_first_token():
    logits = torch.zeros(2, 257)
    logits[1, [100, 200]] = 1
    assert sampler.vocabulary_pass(logits, cap=30.0, temperature=torch.ones(2), noise=None).argmax.tolist() == [0, 100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [96, 2816])
def test_soft_embeddings_have_the_bits_of_transformers(dtype, hidden_size):
    """The expression of the decoder's forward, with its embedding module."""
    vocab_size, scale = 63, hidden_size**0.5
    module = DiffusionGemmaTextScaledWordEmbedding(vocab_size, hidden_size, 0, embed_scale=scale).to(dtype)
    processed = random_logits(5, vocab_size)
    probabilities = processed.to(dtype).softmax(dim=-1, dtype=torch.float32).to(dtype)
    expected = torch.matmul(probabilities, module.weight) * module.embed_scale.to(dtype)
    actual = sampler.soft_embeddings(processed, module.weight, scale, dtype)
    assert actual.dtype == dtype and torch.equal(actual, expected)


def oracle_sampler(bound: float, canvas_length: int, vocab_size: int = 63) -> EntropyBoundSampler:
    return EntropyBoundSampler(EntropyBoundSamplerConfig(bound), canvas_length, vocab_size, 48)


@pytest.mark.parametrize("canvas_length", [1, 32, 63, 256])
def test_accept_equals_transformers_with_a_bound_a_row(canvas_length):
    bounds = [1e-6, 0.1, 0.5, 3.0, 1e6]
    logits = random_logits(len(bounds), canvas_length, 63, scale=6.0)
    logits[:, 1::3] = logits[:, :1]  # equal entropies
    canvas = torch.zeros(1, canvas_length, dtype=torch.int64)
    masks = []
    for row, bound in enumerate(bounds):
        oracle = oracle_sampler(bound, canvas_length)
        oracle.accept_canvas(canvas, canvas, logits[row : row + 1], 1)
        masks.append(oracle.accepted_token_mask)
    assert torch.equal(sampler.accept(oracle_entropy(logits), torch.tensor(bounds)), torch.cat(masks))


@pytest.mark.parametrize(
    ("bound", "accepted"),
    [
        (0.0, [False, True, False, False]),  # the surest token always: its sum without itself is 0
        (0.24, [False, True, False, False]),
        (0.25, [False, True, False, True]),  # 0.25 <= 0.25
        (0.74, [False, True, False, True]),
        (0.75, [True, True, False, True]),  # 0.25 + 0.5
        (1.75, [True, True, True, True]),  # 0.25 + 0.5 + 1
    ],
)
def test_accept_by_hand(bound, accepted):
    entropy = torch.tensor([[1.0, 0.25, 2.0, 0.5]])
    assert sampler.accept(entropy, torch.tensor([bound])).tolist() == [accepted]


def test_accept_takes_every_sure_token_at_any_bound():
    assert sampler.accept(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.tensor([0.0])).tolist() == [[True, True, True, True]]
    assert sampler.accept(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), torch.tensor([0.5])).sum() == 3


def test_next_canvas_equals_transformers(monkeypatch):
    """Acceptance then renoising, with the renoise tokens injected into transformers."""
    logits = random_logits(4, 32, 63, scale=6.0)
    generator = torch.Generator().manual_seed(2)
    current, denoiser, renoise = (torch.randint(63, (4, 32), generator=generator) for _ in range(3))
    oracle = oracle_sampler(0.1, 32)
    accepted = oracle.accept_canvas(current, denoiser, logits, 1)
    monkeypatch.setattr(torch, "randint", lambda **_: renoise)
    expected = oracle.renoise_canvas(accepted, 1)
    mask = sampler.accept(oracle_entropy(logits), torch.full((4,), 0.1))
    assert mask.any() and not mask.all()
    assert torch.equal(sampler.next_canvas(mask, denoiser, renoise), expected)


def walk(num_steps: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Argmax canvases [1, 3] that often repeat and logits [1, 3, 5] that are sometimes sure, one pair a step."""
    generator = torch.Generator().manual_seed(seed)
    canvas, steps = torch.zeros(1, 3, dtype=torch.int64), []
    for _ in range(num_steps):
        if torch.rand((), generator=generator) < 0.3:
            canvas = torch.randint(2, (1, 3), generator=generator)
        scale = 1.0 if torch.rand((), generator=generator) < 0.3 else 100.0
        steps.append((canvas, torch.randn(1, 3, 5, generator=generator) * scale))
    return steps


def test_converged_equals_transformers_as_rows_join_and_leave():
    """Twelve rows with thresholds of their own share one state; each is compared with a criterion that sees that row alone."""
    num_rows, num_steps, canvas_length = 12, 40, 3
    stability = torch.tensor([0, 1, 2, 3] * 3)
    confidence = torch.tensor([0.05, 0.5, 1e-3]).repeat_interleave(4)
    lengths = [5 + 3 * row for row in range(num_rows)]  # a row's canvas ends after these steps and another takes its place
    walks = [walk(num_steps, seed) for seed in range(num_rows)]

    previous = torch.full((num_rows, canvas_length), sampler.NO_CANVAS)
    stable_steps = torch.zeros(num_rows, dtype=torch.int64)
    oracles = [None] * num_rows
    seen = set()
    for step in range(num_steps):
        for row in range(num_rows):
            if step % lengths[row] == 0:
                previous[row], stable_steps[row] = sampler.NO_CANVAS, 0
                oracles[row] = StableAndConfidentStoppingCriteria(int(stability[row]), confidence[row].item())
        canvases = torch.cat([walks[row][step][0] for row in range(num_rows)])
        logits = torch.cat([walks[row][step][1] for row in range(num_rows)])
        actual = sampler.converged(
            canvases,
            oracle_entropy(logits),
            previous_argmax_canvas=previous,
            stable_steps=stable_steps,
            stability_threshold=stability,
            confidence_threshold=confidence,
        )
        expected = torch.cat([oracles[row](*walks[row][step]) for row in range(num_rows)])
        assert torch.equal(actual.converged, expected), step
        seen.update((int(k), bool(done)) for k, done in zip(stability, expected, strict=True))
        previous, stable_steps = canvases, actual.stable_steps
    assert seen == {(k, done) for k in range(4) for done in (False, True)}  # both outcomes were seen at every threshold


def test_converged_by_hand():
    """The canvas A B B B B at threshold 2: the fourth step is the first whose two before it are the same."""
    one, stable_steps = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    previous, done = torch.full((1, 2), sampler.NO_CANVAS), []
    for token in (7, 8, 8, 8, 8):
        canvas = torch.full((1, 2), token)
        result = sampler.converged(
            canvas,
            torch.zeros(1, 2),
            previous_argmax_canvas=previous,
            stable_steps=stable_steps,
            stability_threshold=2 * one,
            confidence_threshold=torch.tensor([0.005]),
        )
        previous, stable_steps = canvas, result.stable_steps
        done.append(bool(result.converged))
    assert done == [False, False, False, True, True]

"""The cases of `test_extras_kernels.py`, which runs this file in Triton's interpreter (TRITON_INTERPRET=1)."""

# ruff: noqa: N803 - constants are in capitals

import math

import pytest
import torch
import triton
import triton.language as tl
from triton_interpreter import let_casts_round_to_bfloat16, save_the_interpreters_time

from backend import noise, sampler
from backend.logit_filters import filtered_sample
from plugins.vocabulary.feedback import soft_embeddings
from plugins.vocabulary.filters import filter_samples
from plugins.vocabulary.launch import vocabulary_pass
from plugins.vocabulary.logprobs import record_logprobs
from plugins.vocabulary.order_kernel import from_ordered_word, ordered_words
from plugins.vocabulary.tables import Adjustment, Filters, LogprobTables, token_words

let_casts_round_to_bfloat16()
save_the_interpreters_time()

# numpy's, about tokens that have no chance: a bound of infinity is meant, and so is no bound where every token is forbidden.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered"),
]

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
FILTERS = [
    {"top_k": 5},
    {"top_k": 4000},
    {"top_k": 1 << 31 - 1},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"top_k": 20, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {},
]
VALUE_TOLERANCE = {"rtol": 2e-6, "atol": 8e-6}  # sums over the vocabulary in another order, of up to ln(V)


@triton.jit
def words_kernel(numbers, words, back, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    word = ordered_words(tl.load(numbers + at))
    tl.store(words + at, word.to(tl.int64))
    tl.store(back + at, from_ordered_word(word))


def test_ordered_words():
    """In the order of their numbers, of which each is found again."""
    tiny = torch.finfo(torch.float32).tiny
    numbers = torch.tensor(
        [-math.inf, -3e38, -1.5, -1.0, -tiny, -1e-45, -0.0, 0.0, 1e-45, tiny, 1.0, 1.5, 2.0, 30.0, 3e38, math.inf]
    )
    words, back = torch.zeros(16, dtype=torch.int64), torch.empty(16)
    words_kernel[(1,)](numbers, words, back, BLOCK=16)
    assert torch.equal(words.diff() > 0, numbers.diff() > 0) and words.min() >= 0 and words.max() < 1 << 32
    assert torch.equal(back, numbers)


def logits(rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, scale: float = 8.0) -> torch.Tensor:
    return (torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale).to(dtype)


class Rows:
    """Rows of logits in slots of their own, in another order; what the plain sampler and the kernels make of them."""

    def __init__(self, raw: torch.Tensor, *, cap: float | None = 30.0, adjusted: bool = False, seed: int = 0):
        count, vocab_size = raw.shape
        each = torch.arange(count)
        self.raw, self.cap = raw, cap
        self.temperature = torch.tensor([0.4, 0.8, 1.0, 2.0])[each % 4]
        self.slots = (each * 7 + 3) % (count + 1) if (count + 1) % 7 else each.flip(0)
        self.positions = each * 37 % 256
        drawn = (each + seed, each % 3, each % 5)
        self.drawn = dict(zip(("seeds", "canvas_indices", "steps"), drawn, strict=True))
        bias = torch.full((count + 1, vocab_size), math.nan)
        biased = torch.zeros(count + 1, dtype=torch.bool)
        repeated = token_words(range(vocab_size), vocab_size).repeat(count + 1, 1)
        penalties = torch.ones(count + 1)
        biases, repetitions = [], []
        for row in range(count if adjusted else 0):
            slot, rows = self.slots[row], (row, row + 1)
            if row % 2 == 0:
                tokens = torch.arange(row % 3, vocab_size, 11)
                bias[slot], biased[slot] = 0, True
                bias[slot, tokens] = torch.linspace(-9, 9, len(tokens))
                biases.append(sampler.LogitBias(*rows, tokens, bias[slot, tokens]))
            if row % 4 < 2:
                tokens = torch.arange(row % 5, vocab_size, 7)
                repeated[slot], penalties[slot] = token_words(tokens, vocab_size), (1.5, 0.75)[row % 2]
                repetitions.append(sampler.Repetition(*rows, tokens, penalties[slot].item()))
        self.adjustment = Adjustment(bias, biased, repeated, penalties, self.slots)
        self.noise = noise.gumbel_noise_rows(*drawn, self.positions, vocab_size)
        shape = {"cap": cap, "temperature": self.temperature}
        self.expected = sampler.vocabulary_pass(raw, noise=self.noise, repetitions=repetitions, bias=biases, **shape)
        self.shape = {**shape, "adjustment": self.adjustment}
        greedy = torch.zeros(count, dtype=torch.bool)
        self.result = vocabulary_pass(raw, greedy=greedy, positions=self.positions, **self.drawn, **self.shape)

    def filtered(self, filters: list[dict]) -> torch.Tensor:
        """With the filters of each row."""
        tables = [torch.full((len(filters) + 1,), off) for off in OFF.values()]
        for row, chosen in enumerate(filters):
            for table, (name, off) in zip(tables, OFF.items(), strict=True):
                table[self.slots[row]] = chosen.get(name, off)
        sampled = self.result.sampled.clone()
        others = {"argmax": self.result.argmax, "positions": self.positions, **self.drawn, **self.shape}
        filter_samples(self.raw, sampled, Filters(*tables), **others)
        return sampled

    def check_filters(self, filters: list[dict]) -> None:
        actual = self.filtered(filters)
        for row, chosen in enumerate(filters):
            expected = filtered_sample(self.expected.processed[row, None], self.noise[row, None], **chosen)
            assert actual[row] == expected, (row, chosen)


@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [97, 5000])
def test_the_pass_over_adjusted_logits(vocab_size, dtype, adjusted):
    for cap in (30.0, None):
        rows = Rows(logits(5, vocab_size, dtype), cap=cap, adjusted=adjusted)
        for name in ("argmax", "sampled"):
            assert torch.equal(getattr(rows.result, name), getattr(rows.expected, name))
        for name in ("entropy", "logprob"):
            torch.testing.assert_close(getattr(rows.result, name), getattr(rows.expected, name), **VALUE_TOLERANCE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-7)], ids=str)
def test_soft_embeddings_of_adjusted_logits(dtype, tolerance):
    """float32: exponents of up to 39 / 0.4, of which a rounding is 8e-6; bfloat16: a few of its roundings."""
    rows = Rows(logits(4, 5000, dtype), adjusted=True)
    embedding = torch.randn(5000, 24).to(dtype)
    expected = sampler.soft_embeddings(rows.expected.processed, embedding, 24**0.5, dtype)
    others = {"argmax": rows.result.argmax, "embedding": embedding, "embed_scale": 24**0.5}
    actual = soft_embeddings(rows.raw.clone(), **others, **rows.shape)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(97, torch.float32), (5000, torch.float32), (5000, torch.bfloat16)])
def test_filters(vocab_size, dtype, scale):
    """Every row another filter, flat distributions, where many draws are rejected, and peaked ones."""
    Rows(logits(len(FILTERS), vocab_size, dtype, scale)).check_filters(FILTERS)


@pytest.mark.parametrize("filters", [{"top_p": 0.5}, {"top_k": 40, "top_p": 0.6, "min_p": 0.01}], ids=str)
def test_many_draws_of_one_filter(filters):
    Rows(logits(60, 448, scale=2.0)).check_filters([filters] * 60)


def test_filters_of_adjusted_and_uncapped_logits():
    raw = logits(len(FILTERS), 5000)
    Rows(raw, adjusted=True).check_filters(FILTERS)
    raw[:, 7::3] = -math.inf
    raw[::2, 9:] = -math.inf
    Rows(raw, cap=None).check_filters(FILTERS)


def test_equal_tokens_stay_or_go_together():
    """Also where a whole row is of equals, and where +0 and -0 are the k-th."""
    raw = torch.zeros(8, 300)
    raw[2:4, ::3] = -0.0
    raw[4:, :9] = 2.0
    raw[6:, 100:200] = 1.0
    filters = [{"top_k": 3}, {"top_p": 0.01}] * 4
    for seed in range(4):
        Rows(raw, seed=100 * seed).check_filters(filters)


def test_filters_change_no_row_without_any():
    rows = Rows(logits(6, 448))
    assert torch.equal(rows.filtered([{}] * 6), rows.result.sampled)
    some = rows.filtered([{"top_k": 2} if row % 2 else {} for row in range(6)])
    assert torch.equal(some[::2], rows.result.sampled[::2])


def recorded(rows: Rows, counts: list[int], most: int = 20, canvas_length: int = 256) -> LogprobTables:
    """The tables, of -1 where nothing was written."""
    slots = len(counts) + 1
    tables = LogprobTables.empty(slots, canvas_length, most)
    tables.counts[rows.slots] = torch.tensor(counts)
    others = {"argmax": rows.result.argmax, "logprob": rows.result.logprob, "positions": rows.positions}
    record_logprobs(rows.raw, tables, **others, **rows.shape)
    return tables


@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(7, torch.float32), (97, torch.float32), (5000, torch.bfloat16)])
def test_logprobs(vocab_size, dtype, adjusted):
    """Of rows that want none, the argmax's only, some and more than there are; everything else stays as it was."""
    counts = [-1, 0, 1, 2, 19, 20]
    rows = Rows(logits(len(counts), vocab_size, dtype), adjusted=adjusted)
    tables = recorded(rows, counts)
    untouched = [torch.full_like(each, -1) for each in tables[1:]]
    for row, count in enumerate(counts):
        cell = rows.slots[row], rows.positions[row]
        if count < 0:
            continue
        torch.testing.assert_close(tables.logprobs[cell], rows.expected.logprob[row], **VALUE_TOLERANCE)
        count = min(count, vocab_size)
        expected = rows.expected.processed[row].double().log_softmax(-1)
        stable = expected.sort(descending=True, stable=True).indices[:count]
        assert torch.equal(tables.tokens[cell][:count], stable)
        torch.testing.assert_close(tables.values[cell][:count], expected[stable].float(), **VALUE_TOLERANCE)
        for table, written in zip(untouched, (0, count, count), strict=True):
            table[cell] = tables[1 + [id(each) for each in untouched].index(id(table))][cell]
            if written < 20 and table.dim() == 3:
                assert (table[cell][written:] == -1).all()
    assert all(torch.equal(*pair) for pair in zip(tables[1:], untouched, strict=True))


def test_logprobs_of_equals_are_in_the_order_of_the_vocabulary():
    raw = torch.zeros(3, 5000)
    raw[1, [77, 4000, 4999]] = 3.0
    raw[2, ::2] = -0.0
    rows = Rows(raw)
    tables = recorded(rows, [4, 5, 20])
    cells = [tables.tokens[slot, position].tolist() for slot, position in zip(rows.slots, rows.positions, strict=True)]
    assert cells[0][:4] == [0, 1, 2, 3]
    assert cells[1][:5] == [77, 4000, 4999, 0, 1]
    assert cells[2] == list(range(20))

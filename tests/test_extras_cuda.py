"""The kernels of biases, penalties, filters and log probabilities at the real vocabulary, against the plain sampler there."""

import pytest
import torch

from backend import noise, sampler
from backend.logit_filters import filtered_sample
from backend.logprobs import top_logprobs
from plugins.vocabulary.tables import Adjustment, Filters, LogprobTables, token_words

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCAB_SIZE, MOST = 262_144, 20
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
FILTERS = ({"top_k": 64}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 500, "top_p": 0.8, "min_p": 1e-3}, {})
ROWS = 4 * len(FILTERS)


@pytest.mark.parametrize("deviation", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_every_kind(dtype, deviation):
    """Half of them with a bias, two of three with a penalty; flat distributions, which draw often, and peaked ones."""
    from plugins.vocabulary.filters import filter_samples
    from plugins.vocabulary.launch import vocabulary_pass
    from plugins.vocabulary.logprobs import record_logprobs

    raw = (torch.randn(ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * deviation).to("cuda", dtype)
    each = torch.arange(ROWS, device="cuda")
    slots = each.flip(0)
    values = torch.full((ROWS, VOCAB_SIZE), torch.nan, device="cuda")
    tokens = torch.arange(3, VOCAB_SIZE, 1001, device="cuda")
    values[::2] = 0
    values[::2, tokens] = torch.linspace(-9, 9, len(tokens), device="cuda")
    biases = [
        sampler.LogitBias(row, row + 1, tokens, values[slot, tokens])
        for row, slot in enumerate(slots.tolist())
        if slot % 2 == 0
    ]
    repeated = [torch.arange(slot % 4, VOCAB_SIZE, 3, device="cuda") for slot in range(ROWS)]
    penalties = torch.tensor([1.0, 1.3, 0.6], device="cuda")[each % 3]
    of_slots = list(zip(repeated, penalties.tolist(), strict=True))
    repetitions = [sampler.Repetition(row, row + 1, *of_slots[slot]) for row, slot in enumerate(slots.tolist())]
    drawn = {"seeds": each * 0x123456789ABCDEF, "canvas_indices": each % 3, "steps": each % 48}
    random = noise.gumbel_noise_rows(*drawn.values(), each, VOCAB_SIZE)
    shape = {"cap": 30.0, "temperature": 0.4 + each / 50}
    expected = sampler.vocabulary_pass(raw, noise=random, repetitions=repetitions, bias=biases, **shape)
    words = torch.stack([token_words(of_slot, VOCAB_SIZE, "cuda") for of_slot in repeated])
    shape |= {"adjustment": Adjustment(values, each % 2 == 0, words, penalties, slots)}
    drawn |= {"positions": each}
    actual = vocabulary_pass(raw, greedy=each < 0, **drawn, **shape)
    assert torch.equal(actual.argmax, expected.argmax) and torch.equal(actual.sampled, expected.sampled)
    for name in ("entropy", "logprob"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=4e-6, atol=3e-5)

    chosen = [{**OFF, **FILTERS[slot % len(FILTERS)]} for slot in range(ROWS)]
    filters = Filters(*(torch.tensor([each[name] for each in chosen], device="cuda") for name in OFF))
    sampled = actual.sampled.clone()
    filter_samples(raw, sampled, filters, argmax=actual.argmax, **drawn, **shape)
    for row, slot in enumerate(slots.tolist()):
        token = filtered_sample(expected.processed[row, None], random[row, None], **chosen[slot])
        assert sampled[row] == token, (row, chosen[slot])

    tables = LogprobTables.empty(ROWS, ROWS, MOST, "cuda")
    tables.counts[:] = each % (MOST + 1)
    record_logprobs(raw, tables, argmax=actual.argmax, logprob=actual.logprob, positions=each, **shape)
    for row, slot in enumerate(slots.tolist()):
        count = slot % (MOST + 1)
        torch.testing.assert_close(tables.logprobs[slot, row], actual.logprob[row], rtol=0, atol=0)
        if count:
            of_row = (expected.processed[row, None], expected.argmax[row, None], expected.logprob[row, None])
            values_of_row = top_logprobs(*of_row, count)[1][0]
            torch.testing.assert_close(tables.values[slot, row, :count], values_of_row, rtol=4e-6, atol=3e-5)
            own = tables.tokens[slot, row, :count]
            assert own[0] == expected.argmax[row] and own.unique().numel() == count
            found = expected.processed[row, own] - expected.processed[row].max() + expected.logprob[row]
            torch.testing.assert_close(found, values_of_row, rtol=4e-6, atol=3e-5)

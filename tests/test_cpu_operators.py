"""The C++ operators of compiled CPU engines against their references; rows do not depend on what they are computed with."""

import shutil

import pytest
import torch
from nvfp4_weights import random_rows, rounded_rows
from test_plugins import attention_inputs
from test_sampler import ENTROPY_TOLERANCE
from tolerances import assert_close

from backend import noise, sampler
from backend.logit_filters import filtered_sample
from backend.session import Session
from builder.errors import BuildError
from builder.targets.cpu_operators import FILE_NAME, compile_operators
from contract.manifest import ManifestError, read_manifest
from contract.stored_file import StoredFile
from plugins import attention_op, moe_op, vocabulary_op
from plugins.attention.reference import paged_attention_reference
from plugins.cpu import load_operators
from plugins.moe.fp8 import from_fp8
from plugins.moe.int4 import from_int4, to_int4
from plugins.moe.nvfp4 import numbers_of, to_nvfp4
from plugins.moe.reference import experts_reference
from plugins.vocabulary.tables import Adjustment, Filters, LogprobTables, token_words

LOGPROB_TOLERANCE = {"rtol": 4e-6, "atol": 4e-5}  # of processed logits up to 35 / 0.4, of which a rounding is 4e-6
CASES = (
    {"prefixes": [0], "counts": [1], "window": 0},
    {"prefixes": [5], "counts": [1], "window": 4},
    {"prefixes": [100, 0, 15, 16, 17], "counts": [8, 3, 1, 20, 5], "window": 16},
    {"prefixes": [257, 1], "counts": [40, 40], "window": 0},
    {"prefixes": [31], "counts": [64], "window": 32},
)


pytestmark = pytest.mark.usefixtures("two_threads_an_operation")


@pytest.fixture(scope="module", autouse=True)
def operators(engine_dir):
    load_operators(engine_dir / FILE_NAME)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_reference(case, causal):
    """Head sizes below, at and above a vector's; pages of one token and more; images in causal passes."""
    for heads, kv_heads, head_dim, page_size in ((4, 2, 16, 8), (6, 1, 36, 16), (2, 2, 8, 1), (3, 1, 128, 32)):
        inputs = attention_inputs(**case, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, images=causal)
        actual = attention_op.paged_attention_cpu(*inputs, causal, case["window"])
        assert_close(actual, paged_attention_reference(*inputs, causal, case["window"]), torch.float32)


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("cut", [1, 31, 32, 70])
def test_a_text_cut_into_two_passes_gives_the_same_bits(cut, window):
    """The second pass reads from pages what the first one wrote."""
    torch.manual_seed(2)
    tokens, page_size = 101, 8
    query, kv = torch.randn(tokens, 4, 16), torch.randn(tokens, 2, 2, 16)
    pages = torch.zeros(13, page_size, 2, 2, 16)
    pages.flatten(0, 1)[:cut] = kv[:cut]
    table, text = torch.arange(13, dtype=torch.int32).unsqueeze(0), torch.full((tokens,), -1, dtype=torch.int32)

    def attend(first: int, end: int) -> torch.Tensor:
        prefix, starts = torch.tensor([first], dtype=torch.int32), torch.tensor([0, end - first], dtype=torch.int32)
        rows = slice(first, end)
        return attention_op.paged_attention_cpu(query[rows], kv[rows], pages, table, prefix, starts, text[rows], True, window)

    assert torch.equal(torch.cat([attend(0, cut), attend(cut, tokens)]), attend(0, tokens))


@pytest.mark.parametrize("rows", [1, 63, 257])
@pytest.mark.parametrize("sizes", [(24, 12), (96, 32), (21, 7)], ids=str)
@pytest.mark.parametrize("routing", ["random", "all rows to the same experts", "one expert"])
def test_experts_equal_reference(rows, sizes, routing):
    """Weights of experts without rows are NaN; some sizes are no multiple of a vector or a tile."""
    torch.manual_seed(1)
    hidden_size, width = sizes
    index = torch.rand(rows, 16).topk(1 if routing == "one expert" else 8).indices
    if routing != "random":
        index = index[:1].expand_as(index).contiguous()
    gate_up, down = torch.randn(16, 2 * width, hidden_size) * 0.3, torch.randn(16, hidden_size, width) * 0.3
    unused = sorted(set(range(16)) - set(index.unique().tolist()))
    gate_up[unused] = down[unused] = float("nan")
    inputs = (torch.randn(rows, hidden_size), index, torch.rand(index.shape), gate_up, down)
    actual = moe_op.experts_cpu(*inputs)
    assert_close(actual, experts_reference(*inputs), torch.float32)
    for some in (slice(0, 1), slice(rows // 2, rows // 2 + 3)):  # bit for bit, whoever shares an expert with a row
        assert torch.equal(moe_op.experts_cpu(*(each[some] for each in inputs[:3]), gate_up, down), actual[some])


@pytest.mark.parametrize("sizes", [(128, 64), (96, 32), (70, 40), (21, 7)], ids=str)
def test_experts_in_4_bits_are_the_numbers_that_they_stand_for(sizes):
    """To the bit; an expert's rows in two units, weights of experts without rows not numbers."""
    hidden_size, width = sizes
    index = torch.stack([torch.randperm(8)[:2] for _ in range(300)])
    gate_up, down = torch.randn(9, 2 * width, hidden_size).bfloat16(), torch.randn(9, hidden_size, width).bfloat16()
    weights = [to_int4(gate_up, halves=2), to_int4(down)]
    numbers = [from_int4(weights[0], 2 * width, hidden_size, halves=2), from_int4(weights[1], hidden_size, width)]
    for each in weights:
        each[8].view(torch.bfloat16).fill_(float("nan"))
    inputs = (torch.randn(300, hidden_size), index, torch.rand(index.shape))
    expected = moe_op.experts_cpu(*inputs, *(each.float() for each in numbers))
    assert torch.equal(moe_op.experts_cpu(*inputs, *weights), expected)
    assert_close(moe_op.experts(*inputs, *weights), expected, torch.float32)


@pytest.mark.parametrize("made", [rounded_rows, None], ids=["rounded", "any numbers and scales"])
@pytest.mark.parametrize("sizes", [(128, 64), (96, 32), (80, 48), (16, 16)], ids=str)
def test_nvfp4_experts_are_the_numbers_that_they_stand_for(sizes, made):
    """To the bit, as above."""
    hidden_size, width = sizes
    index = torch.stack([torch.randperm(8)[:2] for _ in range(300)])
    shapes = (9, 2 * width, hidden_size), (9, hidden_size, width)
    rows = [made(torch.randn(shape)) if made else random_rows(shape) for shape in shapes]
    numbers = [from_fp8(*numbers_of(each)) for each in rows]
    weights = [to_nvfp4(rows[0], halves=2), to_nvfp4(rows[1])]
    for each in weights:
        each[8].fill_(0xFF)  # no numbers
    inputs = (torch.randn(300, hidden_size), index, torch.rand(index.shape))
    expected = moe_op.experts_cpu(*inputs, *numbers)
    assert torch.equal(moe_op.experts_cpu(*inputs, *weights), expected)
    assert_close(moe_op.experts(*inputs, *weights), expected, torch.float32)


@pytest.mark.parametrize("vocab_size", [2, 63, 257, 4096])
@pytest.mark.parametrize("cap", [None, 30.0])
def test_vocabulary_pass_equals_the_sampler(vocab_size, cap):
    torch.manual_seed(3)
    raw, temperature, greedy = torch.randn(9, vocab_size) * 6, torch.linspace(0.4, 0.8, 9), torch.arange(9) % 4 == 0
    if cap is None:
        raw[:, 1::5] = -torch.inf  # forbidden tokens
    seeds, drawn = torch.arange(9) - 4, [torch.arange(9) % count for count in (3, 5, 7)]
    random = noise.gumbel_noise_rows(seeds, *drawn, vocab_size)
    expected = sampler.vocabulary_pass(raw, cap=cap, temperature=temperature, noise=random)
    weights = raw.clone()
    drawn_of_rows = (greedy, seeds, *drawn)
    argmax, sampled, entropy, total = vocabulary_op.vocabulary_cpu(
        weights,
        cap or 0.0,
        temperature,
        *Adjustment.none(raw),
        *drawn_of_rows,
        *Filters.off(9),
        *LogprobTables.empty(9, 256, 20),
    )
    assert torch.equal(argmax, expected.argmax)
    assert torch.equal(sampled, torch.where(greedy, expected.argmax, expected.sampled))
    rounding = torch.finfo(torch.float32).eps * (cap or 15.0) / 0.4  # of the largest processed logit
    torch.testing.assert_close(entropy, expected.entropy, rtol=2e-6, atol=ENTROPY_TOLERANCE["atol"] + rounding)
    torch.testing.assert_close(weights / total[:, None], expected.processed.softmax(-1), rtol=1e-4, atol=1e-6)


EXTRAS = [
    {},
    {"top_k": 5},
    {"top_k": 300},
    {"top_k": 10**6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 700, "top_p": 0.95, "min_p": 0.001},
]


@pytest.mark.parametrize("deviation", [0.2, 3.0, 10.0])
@pytest.mark.parametrize("vocab_size", [5, 257, 5000])
def test_adjustments_filters_and_log_probabilities_equal_the_sampler(vocab_size, deviation):
    """Slots in another order than rows; half of them have a bias, two of three a penalty; all counts of log probabilities."""
    torch.manual_seed(5)
    rows = 3 * len(EXTRAS)
    each, slots = torch.arange(rows), torch.arange(rows).flip(0)
    raw, temperature, greedy = torch.randn(rows, vocab_size) * deviation, torch.linspace(0.4, 0.8, rows), each % 9 == 0
    raw[1] = raw[2, 0] = 0.0  # a row of equals
    biased = each % 2 == 0
    tokens = torch.arange(0, vocab_size, 3)
    values = torch.full((rows, vocab_size), torch.nan)
    values[biased] = 0
    values[biased.nonzero(), tokens] = torch.linspace(-5, 5, len(tokens))
    biases = [sampler.LogitBias(row, row + 1, tokens, values[slot, tokens]) for row, slot in enumerate(slots) if biased[slot]]
    repeated = [torch.arange(vocab_size)[slot % 4 :: 3] for slot in each]
    penalties = torch.tensor([1.0, 1.3, 0.6])[each % 3]
    repetitions = [sampler.Repetition(row, row + 1, repeated[slot], penalties[slot].item()) for row, slot in enumerate(slots)]
    seeds, drawn = each - 4, [each % count for count in (3, 5, 256)]
    random = noise.gumbel_noise_rows(seeds, *drawn, vocab_size)
    shape = {"cap": 30.0, "temperature": temperature}
    expected = sampler.vocabulary_pass(raw, noise=random, repetitions=repetitions, bias=biases, **shape)
    filters, tables = Filters.off(rows), LogprobTables.empty(rows, 256, 20)
    for slot in range(rows):
        for name, value in EXTRAS[slot % len(EXTRAS)].items():
            getattr(filters, name)[slot] = value
    tables.counts[:] = each % 22 - 1
    words = torch.stack([token_words(of_slot, vocab_size) for of_slot in repeated])
    adjustment = Adjustment(values, biased, words, penalties, slots)
    weights = raw.clone()
    argmax, sampled, _, total = vocabulary_op.vocabulary_cpu(
        weights, 30.0, temperature, *adjustment, greedy, seeds, *drawn, *filters, *tables
    )
    assert torch.equal(argmax, expected.argmax)
    torch.testing.assert_close(weights / total[:, None], expected.processed.softmax(-1), rtol=1e-4, atol=1e-6)
    for row, slot in enumerate(slots.tolist()):
        processed = expected.processed[row, None]
        token = filtered_sample(processed, random[row, None], **EXTRAS[slot % len(EXTRAS)])
        assert sampled[row] == (argmax[row] if greedy[row] else token), (row, EXTRAS[slot % len(EXTRAS)])

        count, cell = int(tables.counts[slot]), (slot, int(drawn[-1][row]))
        if count >= 0:
            torch.testing.assert_close(tables.logprobs[cell], expected.logprob[row], **LOGPROB_TOLERANCE)
        written = min(max(count, 0), vocab_size)
        order = processed[0].sort(descending=True, stable=True).indices[:written]
        likely = processed[0].log_softmax(-1)[order]
        torch.testing.assert_close(tables.values[cell][:written], likely, **LOGPROB_TOLERANCE)
        found = processed[0, tables.tokens[cell][:written]]  # of equals to roundings either may come first
        torch.testing.assert_close(found, processed[0, order], **LOGPROB_TOLERANCE)
        assert written == 0 or tables.tokens[cell][0] == argmax[row]
        assert (tables.tokens[cell][written:] == -1).all() and (count >= 0 or tables.logprobs[cell] == -1)
    assert (tables.logprobs != -1).sum() == (tables.counts >= 0).sum()


def test_advance_equals_the_sampler():
    torch.manual_seed(4)
    rows, length, vocab_size = 6, 63, 448
    entropy, argmax = torch.rand(rows, length), torch.randint(vocab_size, (rows, length))
    entropy[:, 1::3] = entropy[:, :1]  # equal entropies
    sampled, previous = torch.randint(vocab_size, (rows, length)), argmax.clone()
    previous[::2, 5] += 1
    bound, confidence = torch.tensor([1e-6, 0.1, 0.5, 3.0, 1e6, 0.0]), torch.tensor([1.0, 1.0, 0.1, 0.1, 1.0, 1.0])
    stable_steps, stability = torch.tensor([0, 0, 1, 1, 5, 1]), torch.tensor([0, 1, 0, 1, 1, 3])
    drawn = torch.tensor([-1, 0, 1, 7, 2**62, 5]), torch.arange(rows), torch.arange(rows) * 3
    canvas, new_stable_steps, converged = vocabulary_op.advance_cpu(
        entropy, argmax, sampled, bound, confidence, previous, stable_steps, stability, *drawn, vocab_size
    )
    renoise = noise.renoise_tokens_rows(*(each[:, None] for each in drawn), torch.arange(length), vocab_size)
    ascending, order = entropy.sort(dim=-1, stable=True)  # of equal entropies the first come first, which PyTorch leaves open
    accepted = ascending.cumsum(dim=-1) - ascending <= bound[:, None]
    mask = torch.zeros_like(accepted).scatter_(-1, order, accepted)
    assert torch.equal(mask.sum(-1), sampler.accept(entropy, bound).sum(-1))
    assert torch.equal(canvas, sampler.next_canvas(mask, sampled, renoise))
    expected = sampler.converged(
        argmax,
        entropy,
        previous_argmax_canvas=previous,
        stable_steps=stable_steps,
        stability_threshold=stability,
        confidence_threshold=confidence,
    )
    assert torch.equal(new_stable_steps, expected.stable_steps) and torch.equal(converged, expected.converged)
    assert converged.any() and not converged.all()


def test_a_compiler_that_fails_is_an_error_with_its_first_telling_line(tmp_path):
    source = tmp_path / "cpu.cpp"
    source.write_text("#warning careful\n#error no such operator\n#error nor this\n")
    told = r"operators\.so: cannot be compiled \([^\n]*no such operator\); expected GCC 12 or newer \(CXX[^\n]*$"
    with pytest.raises(BuildError, match=told):
        compile_operators(tmp_path, (source,))


def test_a_library_for_another_machine_is_refused(engine_dir, tmp_path, monkeypatch):
    engine = tmp_path / "engine"
    shutil.copytree(engine_dir, engine)
    (engine / FILE_NAME).write_bytes(b"ELF")
    manifest = read_manifest(engine)
    written = {FILE_NAME: StoredFile.of(engine / FILE_NAME)}
    manifest.model_copy(update={"files": manifest.files | written}).write(engine)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    with pytest.raises(ManifestError, match=rf"{FILE_NAME}: cannot be loaded \(.*\); build the engine again with --force"):
        Session.load(engine)

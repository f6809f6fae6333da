"""The CUDA path of attention and of the sampler: opened by the compiler, without a GPU; and, where there is one, run on it."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

import triton
from hopper import HopperDriver
from test_attention_sm90 import attention_inputs as described_inputs
from test_plugins import attention_inputs
from tolerances import assert_close
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from backend import noise, sampler
from plugins import attention_op
from plugins.attention.hopper_launch import hopper_attention
from plugins.attention.launch import attention
from plugins.attention.opened import CUDA_DECOMPOSITIONS
from plugins.attention.reference import paged_attention_reference
from plugins.triton_launch import HOPPER_CAPABILITY
from plugins.vocabulary.launch import accept_and_renoise, vocabulary_pass

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER_CAPABILITY, reason="needs a Hopper device"
)
LAYERS = {
    "sliding": {"heads": 16, "kv_heads": 8, "head_dim": 256, "page_size": 32, "window": 1024},
    "full": {"heads": 16, "kv_heads": 2, "head_dim": 512, "page_size": 32, "window": 0},
}


class Layer(torch.nn.Module):
    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (attention_op.paged_attention(*inputs, True, 0),)


@pytest.mark.parametrize("least_tokens", [2, 128, 256, 512, 1024])
def test_the_compiler_sees_the_kernels_and_that_they_write_their_outputs_only(least_tokens, monkeypatch):
    """What it believes to be written, it copies first: that would be the whole cache of the layer. Of so many tokens that the
    tiles always fill the device, there is one kernel."""
    monkeypatch.setattr(triton.runtime.driver, "_active", HopperDriver())
    tokens = 40 + least_tokens
    with FakeTensorMode(shape_env=ShapeEnv()):
        inputs = described_inputs(kv_heads=2, head_dim=512, tokens=tokens, sequences=3, device="cuda")
    rows, sequences = {0: torch.export.Dim("tokens", min=least_tokens)}, torch.export.Dim("sequences", min=2)
    table = {0: sequences, 1: torch.export.Dim("columns", min=2)}
    dynamic = (rows, rows, None, table, {0: sequences}, {0: sequences + 1}, rows)
    program = torch.export.export(Layer(), inputs, dynamic_shapes={"inputs": dynamic})
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["diffusiongemma.paged_attention.default"]

    program = program.run_decompositions(CUDA_DECOMPOSITIONS)
    fakes = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    with fakes[0].fake_mode:
        traced, _ = aot_export_module(program.module(), fakes, trace_joint=False)
    kernels = [node for node in traced.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    written = [["output"]] if least_tokens >= 512 else [["partial", "log_weights"], ["output"]]
    assert [node.kwargs["tensors_to_clone"] for node in kernels] == written
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert not [call for call in calls if "clone" in call or "diffusiongemma" in call]


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("layer", LAYERS)
def test_attention_on_the_device(layer, causal, dtype):
    sizes = LAYERS[layer]
    inputs = attention_inputs(prefixes=[3000, 0, 1023, 1], counts=[257, 1, 63, 256], **sizes, images=causal, dtype=dtype)
    inputs[0].mul_(0.1)  # as normed queries: scores of a few units, so that many keys count
    expected = paged_attention_reference(*inputs, causal, sizes["window"])
    on_device = [each.cuda() for each in inputs]
    assert_close(attention_op.paged_attention(*on_device, causal, sizes["window"]).cpu(), expected, dtype)
    for num_splits in (1, 2, 7):
        assert_close(attention(*on_device, causal, sizes["window"], num_splits=num_splits).cpu(), expected, dtype)


@on_hopper
@pytest.mark.parametrize("page_size", [8, 32, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("layer", LAYERS)
def test_attention_for_hopper_on_the_device(layer, causal, page_size):
    """Slots without a token hold NaN. Some split has no key, some sequence no prefix; some prefixes end within blocks."""
    sizes = {**LAYERS[layer], "page_size": page_size}
    inputs = attention_inputs(
        prefixes=[3000, 0, 1023, 64], counts=[257, 1, 63, 256], **sizes, images=causal, dtype=torch.bfloat16
    )
    inputs[0].mul_(0.1)
    expected = paged_attention_reference(*inputs, causal, sizes["window"])
    on_device = tuple(each.cuda() for each in inputs)
    for num_splits in (1, 2, 7):
        actual = hopper_attention(on_device, causal, sizes["window"], num_splits)
        assert_close(actual.cpu(), expected, torch.bfloat16)
        assert torch.equal(hopper_attention(on_device, causal, sizes["window"], num_splits), actual)


@on_hopper
@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
def test_made_up_indices_stay_inside_on_the_device(causal):
    """As a builder that times a kernel passes them: the results mean nothing, but there are some."""
    sizes = LAYERS["full"]
    inputs = attention_inputs(prefixes=[300, 0], counts=[20, 40], **sizes, images=causal, dtype=torch.bfloat16)
    tensors, indices = inputs[:3], inputs[3:]
    for made_up in (-(2**31), -7, 2**20, 2**31 - 1):
        others = tuple(torch.full_like(each, made_up).cuda() for each in indices)
        hopper_attention((*(each.cuda() for each in tensors), *others), causal, sizes["window"], 2)
    torch.cuda.synchronize()


@on_a_gpu
def test_sampler_on_the_device():
    """262,144 columns; seeds, canvases and steps differ by row. The plain sampler runs on the CPU."""
    torch.manual_seed(0)
    rows, vocab_size, cap = 64, 262144, 30.0
    raw = (torch.randn(rows, vocab_size) * 6).bfloat16()
    each = torch.arange(rows)
    drawn = {"seeds": each * 0x123456789ABCDEF, "canvas_indices": each % 3, "steps": each % 48}
    temperature, greedy = 0.4 + each / 100, each % 5 == 0
    random = noise.gumbel_noise_rows(*drawn.values(), each, vocab_size)
    expected = sampler.vocabulary_pass(raw, cap=cap, temperature=temperature, noise=random)
    per_row = {"temperature": temperature, "greedy": greedy, "positions": each, **drawn}
    actual = vocabulary_pass(raw.cuda(), cap=cap, **{name: value.cuda() for name, value in per_row.items()})
    assert torch.equal(actual.argmax.cpu(), expected.argmax)
    assert torch.equal(actual.sampled.cpu(), torch.where(greedy, expected.argmax, expected.sampled))
    torch.testing.assert_close(actual.entropy.cpu(), expected.entropy, rtol=4e-6, atol=8e-6)


@on_a_gpu
def test_acceptance_on_the_device():
    torch.manual_seed(0)
    rows, length, vocab_size = 8, 256, 262144
    each = torch.arange(rows)
    entropy, argmax = torch.rand(rows, length) ** 4 * 3, torch.randint(0, vocab_size, (rows, length))
    drawn = {"seeds": each * 0x123456789ABCDEF, "canvas_indices": each % 3, "steps": each % 48}
    sampled, bound = torch.randint(0, vocab_size, (rows, length)), each / 4.0
    convergence = {
        "stable_steps": each % 2,
        "stability_threshold": each % 3,
        "confidence_threshold": torch.where(each % 4 == 0, 0.01, 9.0),
    }
    previous = torch.where(each[:, None] % 2 == 0, argmax, argmax + 1)
    random = noise.renoise_tokens_rows(*(value[:, None] for value in drawn.values()), torch.arange(length), vocab_size)
    expected = sampler.converged(argmax, entropy, previous_argmax_canvas=previous, **convergence)
    canvas = sampler.next_canvas(sampler.accept(entropy, bound), sampled, random)

    inputs = {"entropy": entropy, "argmax": argmax, "sampled": sampled, "bound": bound, "previous_argmax": previous}
    inputs = {name: value.cuda() for name, value in {**inputs, **convergence, **drawn}.items()}
    actual = accept_and_renoise(**inputs, vocab_size=vocab_size)
    assert torch.equal(actual.canvas.cpu(), canvas)
    assert torch.equal(actual.stable_steps.cpu(), expected.stable_steps)
    assert torch.equal(actual.converged.cpu(), expected.converged)

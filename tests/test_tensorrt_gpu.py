"""Proof ladder, rung 8: TensorRT plans on an H100 or H200, against the same network run by PyTorch.

Skips where TensorRT or the GPU is missing; `make test-gpu` runs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("tensorrt", reason="needs TensorRT")
pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from small_checkpoints import TINY, VISION, network_session, random_checkpoint, random_image
from test_network import Passes
from tolerances import assert_as_exact, assert_close

from backend.llm import LLM
from backend.sampling_config import SamplingConfig
from backend.session import Session
from builder.build import build_engine

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an H100 or H200"
)

LIMITS = {"page_size": 16, "max_encode_tokens": 128, "max_sequences": 4, "max_head_rows": 96}
# Heads of 256 and 512 and a window, as in the real model: these are the kernels that use most shared memory.
REAL_HEADS = {"head_dim": 256, "global_head_dim": 512, "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4}


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """The engine; the network on the CPU in the engine's dtype, and in float32."""

    engine: Session
    network: Session
    exact: Session

    def check(self, call: Callable[[Session], list[torch.Tensor]]) -> None:
        """float32: equal to rounding. bfloat16: as near to float32 as the network in bfloat16 is."""
        for got, expected, exact in zip(*(call(each) for each in (self.engine, self.network, self.exact)), strict=True):
            if self.engine.dtype == torch.float32:
                assert_close(got.cpu(), expected, torch.float32)
            else:
                assert_as_exact(got.cpu(), expected, exact)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def sessions(request, tmp_path_factory) -> Sessions:
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint = random_checkpoint(directory / "checkpoint", vision=VISION, **REAL_HEADS)
    build_engine(checkpoint, directory / "engine", target="tensorrt", dtype=request.param, **LIMITS)
    return Sessions(
        engine=Session.load(directory / "engine"),
        network=network_session(checkpoint, dtype=request.param, **LIMITS),
        exact=network_session(checkpoint, dtype="float32", **LIMITS),
    )


@pytest.mark.parametrize("num_tokens", [1, 17, 128])
def test_encode_then_commit(sessions, num_tokens):
    tokens = [(7 * place) % 97 for place in range(num_tokens)]

    def encode_twice(session: Session) -> list[torch.Tensor]:
        passes = Passes(session)
        return [*passes.encode(tokens), *passes.encode(tokens[:16])]

    sessions.check(encode_twice)


@pytest.mark.parametrize("num_sequences", [1, 3, 4])
def test_denoise(sessions, num_sequences):
    model = sessions.network.manifest.model
    torch.manual_seed(0)
    canvas = torch.randint(97, (num_sequences, model.canvas_length)).int()
    soft = torch.randn(*canvas.shape, model.hidden_size).bfloat16()
    prefixes, table = torch.arange(num_sequences).int() * 9, torch.arange(2 * num_sequences).view(-1, 2).int()
    pages = [
        torch.randn(8, 16, 2, model.attention[kind].num_kv_heads, model.attention[kind].head_dim).bfloat16()
        for kind in model.layer_types
    ]

    def denoise(session: Session) -> list[torch.Tensor]:
        session.bind_pages([each.to(session.device, session.dtype) for each in pages])
        tables = {kind: table.to(session.device) for kind in model.attention}
        here = (each.to(session.device) for each in (canvas, soft.to(session.dtype), prefixes))
        return [session.denoise(*here, tables)]

    sessions.check(denoise)


@pytest.mark.parametrize("num_soft_tokens", [1, 70, 99])
def test_vision(sessions, num_soft_tokens):
    image = random_image(num_soft_tokens, sessions.network.manifest.model.vision)
    sessions.check(lambda session: [session.vision(image)])


def test_a_captured_call_gives_what_an_uncaptured_one_gives(sessions):
    session = sessions.engine
    hidden = torch.randn(64, session.manifest.model.hidden_size, device="cuda").to(session.dtype)
    expected = session.head(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = session.head(hidden)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_memory_does_not_grow_with_changing_shapes(sessions):
    """TensorRT 11.1 and 11.2 keep a plugin's module for every change of a context's shapes; here no context changes them."""
    passes = Passes(sessions.engine)

    def encode_all() -> None:
        for length in (1, 17, 40, 90, 128):
            passes.encode(list(range(length)))
            passes.cache.length[passes.slot] = 0

    encode_all()
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(50):
        encode_all()
    torch.cuda.synchronize()
    assert before - torch.cuda.mem_get_info()[0] < 8 << 20


def test_the_tiny_checkpoint_writes_what_it_writes_on_the_cpu(tmp_path: Path, engine_dir: Path):
    """Greedy, in float32: the same tokens, unless two of them are as likely as each other to rounding."""
    build_engine(TINY, tmp_path / "engine", target="tensorrt", dtype="float32", max_sequences=2)
    prompt = "<bos><|turn>user\nWhat is 12 + 30?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    sampling = SamplingConfig(temperature=0.0, max_tokens=16, seed=1)
    ours, expected = (LLM(str(engine)).generate(prompt, sampling)[0] for engine in (tmp_path / "engine", engine_dir))
    assert ours.token_ids == expected.token_ids

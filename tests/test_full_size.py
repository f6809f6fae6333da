"""The 26B checkpoint's real shapes without its weights: index, headers, loading, and the memory plan of 80 GB and 141 GB cards.

The tracing of its layers and their build by a TensorRT builder are in `test_tensorrt_rtx.py`.
"""

import mmap
from pathlib import Path

import pytest
import torch
from sparse_checkpoint import SHAPE_26B, sparse_checkpoint
from typer.testing import CliRunner

from backend.__main__ import app as backend_app
from backend.capacity import capacities, parse_bytes
from backend.planner import EngineLimits, plan_memory
from backend.session import Session
from backend.weight_loading import Wanted, cut, reading
from backend.weights import bind_weights
from builder.__main__ import app as builder_app
from builder.build import write_manifest
from builder.config import read_model_config
from builder.errors import BuildError
from builder.export import signatures
from builder.weights import all_weights, binding_shapes, bindings
from contract.checkpoint import Checkpoint
from contract.manifest import ManifestError, Program, read_manifest
from contract.stored_file import StoredFile

TENSOR_BYTES = 2 * 25_823_781_228  # the parameters' 25,823,778,864 and the buffers' 2,364 numbers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return sparse_checkpoint(tmp_path_factory.mktemp("sparse") / "26b")


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory) -> Path:
    """A manifest alone."""
    directory = tmp_path_factory.mktemp("engines") / "26b"
    write_manifest(checkpoint, directory)
    return directory


@pytest.fixture(scope="module")
def manifest(engine):
    return read_manifest(engine)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


# -- Loading


def test_the_index_and_every_header_in_no_space(checkpoint):
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert len(shards) == 11
    assert TENSOR_BYTES < sum(path.stat().st_size for path in shards) < TENSOR_BYTES + 1_000_000
    assert sum(path.stat().st_blocks * 512 for path in shards) < 1_000_000
    tensors = Checkpoint(checkpoint)
    tensors.check(all_weights(read_model_config(checkpoint)))
    assert len([*tensors.names()]) == 1047
    assert sum(tensors.extent(name).num_bytes for name in tensors.names()) == TENSOR_BYTES


def test_weights_are_bound_without_being_read(manifest, engine):
    """For the CPU: every weight of every program, mapped but for those that are stacked; reading all would take 50 GB."""
    before = resident_bytes()
    weights = bind_weights(manifest, engine)
    assert sum(weight.nbytes for weight in weights.values()) == TENSOR_BYTES
    names = bindings(all_weights(manifest.model))
    assert weights.keys() == names.keys()
    assert {name: tuple(weights[name].shape) for name in names} == binding_shapes(all_weights(manifest.model))
    stacked = sum(weights[name].nbytes for name, parts in names.items() if len(parts) > 1)
    assert stacked < 0.06 * TENSOR_BYTES
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    named = {name for each in signatures(manifest.model, manifest.build) for name in each.weights}
    assert named == set(weights)
    assert resident_bytes() - before < stacked + 200_000_000


def test_pieces_for_a_gpu(checkpoint):
    """They cover every byte once, and fill the readers' buffers; only a slice that is larger is a larger piece."""
    tensors, shapes = Checkpoint(checkpoint), all_weights(read_model_config(checkpoint))
    wanted = [
        Wanted(
            extent=tensors.extent(name),
            stored=torch.bfloat16,
            target=torch.empty(shape, dtype=torch.bfloat16, device="meta"),
        )
        for name, shape in shapes.items()
    ]
    most = reading("cuda").piece_bytes
    pieces = cut(wanted, most)
    assert sum(piece.num_bytes for piece in pieces) == sum(piece.target.nbytes for piece in pieces) == TENSOR_BYTES
    assert all(piece.num_bytes <= most or piece.shape[0] == 1 for piece in pieces)
    assert len(pieces) < 1.3 * TENSOR_BYTES / most + len(shapes)
    places = [(piece.path, piece.offset) for piece in pieces]
    assert places == sorted(places)


# -- Planning


FULL = 5 * 2 * 2 * 512 * 2  # bytes of a token in the full-attention layers: keys and values of 2 heads of 512, bfloat16
SLIDING = 25 * 2 * 8 * 256 * 2
WINDOW = 33  # pages of 32 tokens that a window of 1,023 touches at most


@pytest.mark.parametrize("num_tokens", [1024, 8192, 262_144])
def test_keys_and_values_by_hand(num_tokens, manifest):
    plan = plan_memory(manifest, EngineLimits(max_sequences=3, max_cached_tokens=3 * num_tokens, prefix_cache=False))
    kv_bytes = 3 * (num_tokens * FULL + min(num_tokens, WINDOW * 32) * SLIDING)
    assert plan.kv_bytes == kv_bytes
    assert plan.num_sequences(num_tokens) == 3
    assert plan.weights_bytes == TENSOR_BYTES


def test_passes_by_hand(manifest):
    """Of 16 canvases on a GPU and new tokens, 4,352 rows: ten tensors like the residual, 8 experts' products, the MLP's."""
    plan = plan_memory(manifest, EngineLimits(max_sequences=16, max_cached_tokens=1024), device_type="cuda")
    step = 4352 * (10 * 2816 + 8 * (2816 + 704) + 3 * 2112) * 2
    assert plan.graphs_bytes == step + 512 * 2**20  # 1,024 rows of logits
    assert plan.workspace_bytes == plan.graphs_bytes  # a step runs uncaptured before it is captured
    tables = 256 * (4 + 20 * 12) + 4 * 262_144 + 262_144 // 8  # two rows of them: one is for the first token of a canvas
    assert plan.state_bytes == 256 * (2816 * 2 + 64) + 2 * tables
    assert plan.states_bytes == 17 * plan.state_bytes


@pytest.mark.parametrize(
    ("memory", "fitting"),
    [("80GB", {1024: 64, 8192: 57, 262_144: 4}), ("141GB", {8192: 64, 65_536: 53, 262_144: 15})],
)
def test_sequences_on_a_card(memory, fitting, manifest):
    """A sequence of 262,144 tokens has 5.58 GB of keys and values: (80 - 52.7) / 5.58 are 4.9, less what the passes take, 4."""
    rows = capacities(manifest, parse_bytes(memory), device_type="cuda", lengths=[*fitting])
    assert {each.num_tokens: each.num_sequences for each in rows} == fitting


@pytest.mark.parametrize("memory_bytes", [80 * 10**9, 141 * 10**9])
def test_what_fits_on_a_card_by_hand(memory_bytes, manifest):
    """One sequence more would not fit, and the report of a plan for as many says so too."""
    for each in capacities(manifest, memory_bytes, device_type="cuda"):
        limits = EngineLimits(max_sequences=each.num_sequences, memory_bytes=memory_bytes, prefix_cache=False)
        plan = plan_memory(manifest, limits, device_type="cuda")
        of_one = each.num_tokens * FULL + min(each.num_tokens, WINDOW * 32) * SLIDING
        assert each.kv_bytes == each.num_sequences * of_one
        assert each.total_bytes == plan.total_bytes - plan.kv_bytes + each.kv_bytes <= memory_bytes
        assert plan.num_sequences(each.num_tokens) == each.num_sequences
        if each.num_sequences < manifest.build.max_sequences:
            step = 256 * (10 * 2816 + 8 * (2816 + 704) + 3 * 2112) * 2  # a canvas more, in the graphs and out of them
            assert each.total_bytes + of_one + 2 * step + plan.state_bytes > memory_bytes


def test_the_commands(tmp_path):
    """From config.json alone, as before a download."""
    directory = tmp_path / "plan"
    written = CliRunner().invoke(builder_app, ["manifest", str(SHAPE_26B), str(directory)])
    assert written.exit_code == 0 and "from config.json alone" in written.stdout
    command = ["plan", str(directory), "--memory", "80GB", "--device", "cuda", "--max-sequences", "8", "--length", "8192"]
    planned = CliRunner().invoke(backend_app, command)
    assert planned.exit_code == 0
    assert "weights 51.65" in planned.stdout and "graphs" in planned.stdout and "8,192" in planned.stdout
    small = CliRunner().invoke(backend_app, ["plan", str(directory), "--memory", "40GB", "--device", "cuda"])
    assert small.exit_code == 1
    assert small.stderr.startswith("error: --memory: got 40.00 GB, expected at least ")
    assert len(small.stderr.strip().splitlines()) == 1


def test_refusals(engine, tmp_path):
    with pytest.raises(ManifestError, match="got a manifest alone, expected an engine with its programs; build it with"):
        Session.load(engine)
    for text in ("eighty", "0GB", "80 gigabytes", "9" * 400 + "GB"):
        with pytest.raises(ManifestError, match=f"memory: got '{text}', expected a size such as 80GB"):
            parse_bytes(text)
    assert (parse_bytes("80GB"), parse_bytes("79.5 GiB"), parse_bytes("1000")) == (80 * 10**9, int(79.5 * 2**30), 1000)
    result = CliRunner().invoke(backend_app, ["plan", str(engine), "--memory", "80GB", "--device", "tpu"])
    assert "--device: got 'tpu', expected cpu or cuda" in result.stderr


def test_a_built_engine_is_not_replaced_by_its_manifest(checkpoint, engine, manifest, tmp_path):
    head = Program(file="head.pt2", inputs=(), weights=(), outputs=())
    files = {"head.pt2": StoredFile(size_bytes=0, sha256="")}
    manifest.model_copy(update={"programs": {"head": head}, "files": files}).write(tmp_path)
    with pytest.raises(BuildError, match="is an engine with programs, and has its manifest; choose another directory"):
        write_manifest(checkpoint, tmp_path)

"""Building for a GPU and loading what was built for one, as far as it goes on a machine without a GPU."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_checkpoints import TINY, network_session, random_checkpoint
from torch._inductor.runtime.cache_dir_utils import cache_dir
from typer.testing import CliRunner

from backend.session import Session
from backend.weights import bind_weights
from builder.__main__ import app
from builder.compiling import compile_programs, own_cache
from builder.config import read_model_config
from builder.description import describe
from builder.errors import BuildError
from builder.export import Signature, TracedProgram, export_program, minimums, signatures
from builder.targets import choose_device
from builder.targets.compiled import Compiled
from builder.targets.inductor import _store_shared, opened
from builder.weights import all_weights
from contract.checkpoint import Checkpoint
from contract.manifest import BuildConfig, Gpu, ManifestError, Program, Variant, read_manifest
from contract.model_config import ModelConfig
from contract.stored_file import StoredFile

H200 = Gpu(name="NVIDIA H200", compute_capability=(9, 0))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has an H200."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H200.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: H200.compute_capability)


def build_config(**choices) -> BuildConfig:
    return BuildConfig(**{"target": "inductor", "dtype": "bfloat16", "device": "cuda", **choices})


# -- Choosing the device


def test_without_a_gpu(no_gpu):
    assert choose_device("auto") == ("cpu", "PyTorch finds no GPU here")
    assert choose_device("cpu") == ("cpu", "asked for")
    with pytest.raises(BuildError, match=r"device 'cuda': PyTorch finds no GPU here, .* use --device cpu, or install"):
        choose_device("cuda")


def test_with_a_gpu(gpu):
    assert choose_device("auto") == ("cuda", "NVIDIA H200 (compute capability 9.0) is here")
    assert choose_device("cuda")[0] == "cuda"
    assert choose_device("cpu")[0] == "cpu"


def test_the_command_line_refuses_in_one_line(no_gpu, tmp_path):
    result = CliRunner().invoke(app, ["build", str(TINY), str(tmp_path / "e"), "--device", "cuda"])
    assert result.exit_code == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: device 'cuda'")


# -- Sizes without kernels


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"head_dim": 96}, "sliding_attention: attention kernel: got head_dim 96, expected a power of two of at least 16"),
        ({"head_dim": 8}, "sliding_attention: attention kernel: got head_dim 8, expected a power of two"),
        ({"global_head_dim": 48}, "full_attention: attention kernel: got head_dim 48, expected a power of two"),
        (
            {"num_attention_heads": 32},
            "full_attention: attention kernel: got 32 query heads and 1 key/value heads, expected a multiple, at most 16 times",
        ),
    ],
)
def test_a_model_without_kernels_is_refused_before_anything_long(sizes, message, gpu, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="the kernels are written in Triton's language")
    monkeypatch.setattr("builder.build.compile_programs", None)
    checkpoint = random_checkpoint(tmp_path / "checkpoint", **sizes)
    result = CliRunner().invoke(app, ["build", str(checkpoint), str(tmp_path / "e"), "--target", "inductor"])
    [line] = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {message}") and line.endswith("; a CPU takes others, with --device cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_cannot_be_traced_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("The size of tensor a (33) must match b (32)\n\nWhile executing %mul\nOriginal traceback:")

    monkeypatch.setattr("torch.export.export", refuse)
    model, build = read_model_config(TINY), BuildConfig(target="inductor", dtype="float32")
    with pytest.raises(BuildError) as refused:
        export_program(signatures(model, build)[0], model, build)
    assert str(refused.value) == (
        "program encode: cannot be traced (RuntimeError: The size of tensor a (33) must match b (32)); expected sizes that its "
        "operators take, see the checkpoint's config.json"
    )


# -- Loading what was built for a GPU


@pytest.fixture
def engine_of_an_h200(tmp_path):
    """A manifest alone: what is wrong with the machine is said before files are looked for."""
    model = read_model_config(TINY)
    build = BuildConfig(target="inductor", dtype="float32")
    manifest = describe(model, build, Checkpoint(TINY), all_weights(model), TINY, tmp_path)
    made = {
        "programs": {"head": Program(file="head.pt2", inputs=(), weights=(), outputs=())},
        "files": {"head.pt2": StoredFile(size_bytes=0, sha256="")},
    }
    manifest.model_copy(update={"gpu": H200, "build": build_config(dtype="float32"), **made}).write(tmp_path)
    return tmp_path


def test_an_engine_for_a_gpu_is_refused_without_one(engine_of_an_h200, no_gpu):
    with pytest.raises(ManifestError, match=r"built for NVIDIA H200 \(compute capability 9.0\), but PyTorch finds no GPU"):
        Session.load(engine_of_an_h200)


def test_an_engine_for_another_gpu_is_refused(engine_of_an_h200, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ManifestError, match=r"the GPU here is NVIDIA A100 \(compute capability 8.0\); build it again"):
        Session.load(engine_of_an_h200)


def test_an_engine_of_another_version_says_how_to_build_it_again(engine_of_an_h200):
    """Without --force, which no command that serves has, and a build does not need."""
    manifest = read_manifest(engine_of_an_h200)
    manifest.model_copy(update={"plugin_abi": manifest.plugin_abi - 1}).write(engine_of_an_h200)
    told = rf"got plugin ABI {manifest.plugin_abi - 1}, .* build it again with: python -m builder build CHECKPOINT ENGINE"
    with pytest.raises(ManifestError, match=told):
        Session.load(engine_of_an_h200)


# -- Variants


def test_programs_are_compiled_for_few_some_and_many_rows():
    """Encode, that is: denoise chooses its kernels when it is captured."""
    model = read_model_config(TINY)

    def least(**choices) -> dict[str, tuple[int, ...]]:
        build = build_config(**choices)
        return {each.name: minimums(each, build) for each in signatures(model, build)}

    assert least() == {"encode": (1, 512, 2048), "denoise": (1,), "head": (1,), "mixed": (1,), "vision": (1,)}
    assert least(max_encode_tokens=8192)["encode"] == least(max_encode_tokens=4096)["encode"] == (1, 512, 2048, 4096)
    assert least(max_encode_tokens=4095)["encode"] == (1, 512, 2048)
    assert least(max_encode_tokens=511)["encode"] == (1,)
    assert set(least(batch_invariant=True).values()) == {(1,)}
    assert set(least(device="cpu").values()) == set(least(dtype="float32").values()) == {(1,)}


def test_variants_are_compiled_and_recorded(monkeypatch, tmp_path):
    model = read_model_config(TINY).model_copy(update={"canvas_length": 256})
    # In this process, where the compiler is replaced.
    monkeypatch.setattr("builder.compiling.processes", lambda at_once: ThreadPoolExecutor(1))
    monkeypatch.setattr("builder.compiling.compiler", lambda *_: lambda program, _: Compiled(file=f"{program.name}.pt2"))
    programs = compile_programs(model, build_config(max_encode_tokens=8192), tmp_path, lambda line: None)
    assert programs["encode"].file == "encode.pt2"
    assert programs["encode"].variants == (
        Variant(minimum=512, file="encode.512.pt2"),
        Variant(minimum=2048, file="encode.2048.pt2"),
        Variant(minimum=4096, file="encode.4096.pt2"),
    )
    assert (programs["head"].file, programs["head"].variants) == ("head.pt2", ())


def test_a_missing_variant_is_named(engine_of_an_h200, gpu, tmp_path):
    head = Program(file="head.pt2", inputs=(), weights=(), outputs=(), variants=(Variant(minimum=4, file="head.4.pt2"),))
    (engine_of_an_h200 / "head.pt2").touch()
    manifest, empty = read_manifest(engine_of_an_h200), StoredFile.of(engine_of_an_h200 / "head.pt2")
    files = {"head.pt2": empty, "head.4.pt2": empty}
    manifest.model_copy(update={"programs": {"head": head}, "files": files}).write(engine_of_an_h200)
    with pytest.raises(ManifestError, match=r"head\.4\.pt2: missing; build the engine again with --force"):
        Session.load(engine_of_an_h200)


def test_the_session_runs_the_variant_for_the_size(tmp_path):
    session = network_session(random_checkpoint(tmp_path))
    programs = {name: lambda tensors: ["base"] for name in session.manifest.programs}
    variants = {"head": [(4, lambda tensors: ["four"]), (8, lambda tensors: ["eight"])]}
    weights = {name: torch.zeros(1) for name in session.manifest.weights}
    session = Session(session.manifest, programs, weights, variants)
    chosen = {rows: session.head(torch.zeros(rows, 48)) for rows in (1, 3, 4, 7, 8, 100)}
    assert chosen == {1: "base", 3: "base", 4: "four", 7: "four", 8: "eight", 100: "eight"}


# -- Tracing for a GPU that is not here


def test_a_program_is_traced_and_opened_for_a_gpu_that_is_not_here(no_gpu, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")
    from hopper import HopperDriver

    monkeypatch.setattr(triton.runtime.driver, "_active", HopperDriver())
    model, build = read_model_config(random_checkpoint(tmp_path)), build_config()
    layers = model.num_layers
    expected = {
        # Of the last layer an encode pass keeps keys and values only.
        "encode": {
            "normed_heads_triton": layers,
            "paged_attention": layers - 1,
            "feed_forward_triton": layers - 1,
        },
        "denoise": {"normed_heads_triton": layers, "paged_attention": layers, "feed_forward": layers},
        "mixed": {"normed_heads_triton": layers, "mixed_attention": layers, "feed_forward": layers},
        "head": {},
        "vision": {"paged_attention_triton": model.vision.num_layers},
    }
    for signature in signatures(model, build):
        program = export_program(signature, model, build)
        user_inputs = set(program.exported.graph_signature.user_inputs)
        inputs = [node.meta["val"] for node in program.exported.graph.nodes if node.name in user_inputs]
        assert {each.device.type for each in inputs} == {"cuda"}
        assert called(program) == expected[signature.name]
    encode = signatures(model, build)[0]
    variants = ((2048, 8192, "feed_forward_triton"), (2048, 2048, "feed_forward_triton"), (4096, 4096, "feed_forward"))
    for minimum, most, name in variants:
        program = export_program(encode, model, build_config(max_encode_tokens=most), minimum)
        assert called(program) == {"normed_heads_triton": layers, "paged_attention": layers - 1, name: layers - 1}
    for signature, fewer in zip(signatures(model, build_config(batch_invariant=True))[:2], (1, 0), strict=True):
        program = export_program(signature, model, build_config(batch_invariant=True))
        calls = {"paged_attention_in_splits": layers - fewer, "feed_forward": layers - fewer}
        assert called(program) == {"normed_heads_triton": layers, **calls}


def called(program: TracedProgram) -> Counter:
    """How many times the opened program calls each of our operators."""
    names = [str(node.target) for node in opened(program).graph.nodes if node.op == "call_function"]
    return Counter(name.split(".")[1] for name in names if name.startswith("diffusiongemma."))


def test_two_compilations_share_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "common"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    seen = []
    for _ in range(2):
        with own_cache(tmp_path):
            seen.append(Path(cache_dir()))
            assert seen[-1].is_dir() and os.environ["TRITON_CACHE_DIR"] == str(seen[-1] / "triton")
        assert Path(cache_dir()) == tmp_path / "common" and "TRITON_CACHE_DIR" not in os.environ
    assert len({*seen, tmp_path / "common"}) == 3


def test_stored_values_change_nothing(tmp_path):
    """The network's denoise on the CPU, before and after. Two layers share a cosine and a sine, all three the sequences' starts
    and the image blocks; a third layer has a cosine and a sine of its own."""
    session = network_session(random_checkpoint(tmp_path), page_size=8)
    model, build = session.manifest.model, session.manifest.build
    signature = signatures(model, build)[1]
    program = traced(signature, model, build)
    sizes = {"sequences": 3, "columns": 2, "pages": 9}
    inputs = {}
    for binding in signature.inputs:
        shape = [sizes[size.rpartition(".")[2]] if isinstance(size, str) else size for size in binding.shape]
        inputs[binding.name] = torch.randint(9, shape, dtype=torch.int32) if binding.dtype == "int32" else torch.randn(shape)
    bound = bind_weights(session.manifest, tmp_path, tmp_path)
    weights = {name: bound[name] for name in signature.weights}
    expected = program.module()(inputs, weights)
    _store_shared(program)
    stored = [node for node in program.graph.nodes if node.target == torch.ops.aten.as_strided.default]
    assert len(stored) == 4
    assert all(len(node.args[0].users) == 2 for node in stored)  # its number of rows, and the view
    assert torch.equal(program.module()(inputs, weights), expected)


def traced(signature: Signature, model: ModelConfig, build: BuildConfig) -> torch.export.ExportedProgram:
    """As `export_program` traces it for a GPU, with the plugin operators as they are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("builder.export.PLAIN_DECOMPOSITIONS", {})
        return export_program(signature, model, build).exported.run_decompositions({})

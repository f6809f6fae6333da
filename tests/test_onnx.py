"""Proof ladder, rung 5: the exported ONNX programs in ONNX Runtime against the network, and a whole generation.

In bfloat16, which ONNX Runtime lacks on the CPU, the reference evaluator of ONNX takes its place.
"""

import onnx
import pytest
import torch
from onnx_once import LIMITS, TWO_LAYERS, export_once, small_checkpoint, to_onnx_once
from onnx_reference import reference_program
from onnx_runtime import onnx_session
from oracles import Oracle
from small_checkpoints import TINY, network_session, random_checkpoint
from tokenizers import Tokenizer
from tolerances import SAME_ROUNDINGS_RATIO, assert_as_exact, assert_close
from typer.testing import CliRunner

from backend import LLM, SamplingConfig
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults
from backend.session import Session
from builder.__main__ import app
from builder.build import build_engine
from contract.manifest import Binding
from plugins.library import NAMESPACE

PROGRAMS = ("encode", "denoise", "head", "vision")
SIZES = {"tokens": 37, "sequences": 3, "starts": 4, "pages": 40, "columns": 13, "images": 5, "rows": 11, "soft_tokens": 4}
PREFIXES = (0, 5, 101)  # the last one beyond every window
STARTS = (0, 20, 21, 37)
IMAGE_TOKENS = slice(3, 8)


@pytest.fixture(scope="module", params=["tiny", "128 experts"])
def checkpoint(request, tmp_path_factory):
    return TINY if request.param == "tiny" else small_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def session(checkpoint) -> Session:
    return onnx_session(checkpoint, **LIMITS)


def inputs_of(session: Session, name: str) -> dict[str, torch.Tensor]:
    """Every input random: packed sequences of unequal length, prefixes beyond the window, an image's tokens."""
    generator, vocab_size = torch.Generator().manual_seed(1), session.manifest.model.vocab_size
    return {each.name: values_of(each, vocab_size, generator) for each in session.manifest.programs[name].inputs}


def values_of(binding: Binding, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """Random values for one input; the page tables give every sequence pages of its own."""
    name = binding.name
    shape = [SIZES[size.rpartition(".")[2]] if isinstance(size, str) else size for size in binding.shape]
    if name.endswith("page_table"):
        return torch.randperm(SIZES["pages"], generator=generator)[: shape[0] * shape[1]].view(shape).int()
    if name == "prefix_lengths":
        return torch.tensor(PREFIXES, dtype=torch.int32)
    if name == "sequence_starts":
        return torch.tensor(STARTS, dtype=torch.int32)
    if name in ("image_index", "image_block_ids"):
        values = torch.full(shape, -1, dtype=torch.int32)
        values[IMAGE_TOKENS] = torch.arange(5, dtype=torch.int32) if name == "image_index" else 0
        return values
    if name == "patch_positions":
        return torch.randint(8, shape, generator=generator, dtype=torch.int32)
    if name == "patch_range":
        return torch.tensor([0, SIZES["soft_tokens"] * 9], dtype=torch.int32)
    if name == "positions":
        pairs = zip(PREFIXES, STARTS[:-1], STARTS[1:], strict=True)
        return torch.cat([torch.arange(prefix, prefix + end - start) for prefix, start, end in pairs]).int()
    if binding.dtype == "int32":
        return torch.randint(vocab_size, shape, generator=generator, dtype=torch.int32)
    return torch.randn(shape, generator=generator).to(getattr(torch, binding.dtype))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_equals_the_network(name, checkpoint, session):
    inputs = inputs_of(session, name)
    actual = session._run(name, **inputs)
    expected = network_session(checkpoint, dtype="float32", **LIMITS)._run(name, **inputs)
    for binding, ours, theirs in zip(session.manifest.programs[name].outputs, actual, expected, strict=True):
        assert str(ours.dtype) == f"torch.{binding.dtype}"
        assert_close(ours, theirs, torch.float32)


def test_bfloat16_is_as_exact_as_the_network(tmp_path):
    """Every row takes every expert, so that a rounding in the router never chooses another one."""
    checkpoint = random_checkpoint(tmp_path, seed=9, num_experts=8, moe_intermediate_size=64, hidden_size=96, **TWO_LAYERS)
    session = onnx_session(checkpoint, dtype="bfloat16", runner=reference_program, **LIMITS)
    network, exact = (network_session(checkpoint, dtype=dtype, **LIMITS) for dtype in ("bfloat16", "float32"))
    for name in PROGRAMS:
        inputs = inputs_of(session, name)
        wide = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        outputs = (session._run(name, **inputs), network._run(name, **inputs), exact._run(name, **wide))
        for ours, theirs, truth in zip(*outputs, strict=True):
            assert ours.dtype == torch.bfloat16
            assert_as_exact(ours, theirs, truth, SAME_ROUNDINGS_RATIO)


def test_a_generation_gives_the_tokens_of_transformers(checkpoint, session):
    """Prompts short and beyond the window in one batch, several canvases, the last one cut."""
    defaults = GenerationDefaults.from_json(checkpoint / "generation_config.json")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    llm, oracle = LLM.from_engine(Engine(session, tokenizer, defaults, EngineLimits())), Oracle(checkpoint)
    max_tokens, ends = 2 * oracle.canvas_length + 5, set(defaults.eos_token_ids)
    prompts = [
        torch.randint(20, oracle.vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (3, 90)
    ]
    configs = [SamplingConfig(seed=seed, max_tokens=max_tokens, max_denoising_steps=6) for seed in (1, 2)]
    for prompt, config, result in zip(prompts, configs, llm.generate(prompts, configs), strict=True):
        expected = oracle.generate(
            prompt,
            seed=config.seed,
            max_new_tokens=max_tokens,
            max_denoising_steps=6,
            eos_token_id=sorted(ends) or None,
            pad_token_id=None,
        )
        assert result.token_ids == expected.token_ids(max_tokens=max_tokens, ends=ends)
        assert result.num_steps == expected.num_steps


@pytest.fixture
def made_once(monkeypatch):
    """What two builds, and the files of one of them, are made from: programs that other tests run, too."""
    for module in ("compiling", "onnx_export"):
        monkeypatch.setattr(f"builder.{module}.export_program", export_once)
    monkeypatch.setattr("builder.onnx_export.to_onnx", to_onnx_once)


def test_a_build_keeps_the_onnx_files_on_request(uncompiled, made_once, tmp_path):
    """They have the manifest's bindings, the nodes that TensorRT's plugins answer to, and no weight."""

    checkpoint, engine, lines = small_checkpoint(tmp_path / "checkpoint"), tmp_path / "engine", []
    choices = {"dtype": "float32", **LIMITS}
    build_engine(checkpoint, engine, **choices)
    assert not list(engine.glob("*.onnx"))
    words = [word for name, value in choices.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert CliRunner().invoke(app, ["build", str(checkpoint), str(engine), "--keep-onnx", *words]).exit_code == 0
    manifest = build_engine(checkpoint, engine, keep_onnx=True, report=lines.append, **choices)
    assert "up to date" in lines[-1]
    for name, program in manifest.programs.items():
        graph = onnx.load(engine / f"{name}.onnx").graph
        activations = {each.name: each.shape for each in (*program.inputs, *program.outputs)}
        assert [each.name for each in graph.input] == [*(each.name for each in program.inputs), *program.weights]
        assert [each.name for each in graph.output] == [each.name for each in program.outputs]
        for value in (*graph.input, *graph.output):
            sizes = tuple(each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim)
            assert sizes == (activations.get(value.name) or manifest.weights[value.name].shape)
        assert sum(each.ByteSize() for each in graph.initializer) < 5000
        ours = [node for node in graph.node if node.domain == NAMESPACE]
        layers = {"encode": 1, "denoise": 2, "head": 0, "vision": 1}[name]  # encode ends with the last layer's keys and values
        of_a_layer = ["PagedAttention"] if name == "vision" else ["PagedAttention", "Experts"]
        assert [node.op_type for node in ours] == of_a_layer * layers
        finds_plugin = {"plugin_namespace": b"diffusiongemma", "plugin_version": b"1", "aot": 1}
        for index, node in enumerate(ours):
            arguments = {"causal": int(name == "encode"), "window": 24 if index == 0 and name != "vision" else 0}
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            assert attributes == finds_plugin | (arguments if node.op_type == "PagedAttention" else {})
            assert len(node.input) == (7 if node.op_type == "PagedAttention" else 5)

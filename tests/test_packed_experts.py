"""Engines whose experts' weights are packed: when they are, how they are loaded, and that generations are those of the numbers
that the packed weights stand for."""

import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import TINY, network_session, random_checkpoint
from test_generation import RANDOM, WINDOW, prompt_of
from tiny_tasks import questions
from tokenizers import Tokenizer
from typer.testing import CliRunner

from backend import LLM, SamplingConfig
from backend.capacity import capacities, parse_bytes
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults
from backend.planner import plan_memory
from builder import build as building
from builder.__main__ import app
from builder.build import build_engine, write_manifest
from builder.config import read_model_config
from builder.errors import BuildError
from builder.quantize import quantize_checkpoint
from builder.targets import choose_expert_weights
from builder.weights import all_weights, bound_weights, experts_format, is_of_experts
from contract.manifest import Arrangement, BuildConfig, Manifest
from contract.model_config import ModelConfig
from plugins.moe.arranging import HALVES
from plugins.moe.packing import pack, packed_shape, unpack

SHAPE_26B = TINY.parent / "diffusiongemma-26B-A4B"
GATE_UP, DOWN = "model.decoder.layers.0.experts.gate_up_proj", "model.decoder.layers.0.experts.down_proj"
NUM_QUESTIONS = 20


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """The tiny checkpoint, with the numbers that its packed experts stand for."""
    return with_rounded_experts(TINY, tmp_path_factory.mktemp("rounded") / "tiny")


def with_rounded_experts(checkpoint, directory):
    shutil.copytree(checkpoint, directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if is_of_experts(name):
            halves = HALVES[name.rpartition(".")[2]]
            tensors[name] = unpack(pack(tensor.bfloat16(), halves), *tensor.shape[1:], halves).to(tensor.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


# -- What is chosen


def chosen(model: ModelConfig, wanted: str = "auto", **choices) -> str:
    given = {"target": "inductor", "dtype": "bfloat16", "device": "cuda", "keep_onnx": False, **choices}
    return choose_expert_weights(wanted, model, **given)[0]


def test_they_are_packed_where_kernels_take_them():
    model = read_model_config(TINY)
    assert chosen(model) == "packed"
    assert chosen(model, "plain") == "plain"
    assert chosen(model, device="cpu") == "plain"
    assert chosen(model, "packed", device="cpu") == "packed"
    in_fp8 = model.model_copy(update={"experts_dtype": "float8_e4m3fn"})
    cannot = [(model, {"dtype": "float32"}), (model, {"target": "tensorrt"}), (model, {"keep_onnx": True}), (in_fp8, {})]
    for each, choices in cannot:
        assert chosen(each, **choices) == "plain"
        with pytest.raises(BuildError, match="expert_weights: got 'packed', expected 'plain': "):
            chosen(each, "packed", **choices)


def test_the_format_follows_device_and_rows():
    model = read_model_config(TINY)
    in_fp8 = model.model_copy(update={"experts_dtype": "float8_e4m3fn"})

    def wanted(config: ModelConfig, **choices) -> str | None:
        return experts_format(config, BuildConfig(target="inductor", dtype="bfloat16", **choices))

    assert wanted(model) is wanted(model, device="cuda") is wanted(in_fp8) is None
    assert wanted(model, expert_weights="packed") == "packed"
    assert wanted(in_fp8, device="cuda") == "wide"
    assert wanted(in_fp8, device="cuda", expert_activations="float8") == "narrow"


def test_what_programs_are_called_with():
    model = read_model_config(SHAPE_26B)
    build = BuildConfig(target="inductor", dtype="bfloat16", expert_weights="packed")
    bound = bound_weights(all_weights(model), model, build)
    assert bound[GATE_UP].shape == packed_shape((128, 1408, 2816), 2)
    assert bound[DOWN].shape == packed_shape((128, 2816, 704), 1)
    assert bound[GATE_UP].dtype == bound[DOWN].dtype == "int32"
    assert (bound[GATE_UP].arrangement.halves, bound[DOWN].arrangement.halves) == (2, 1)
    assert {each.dtype for name, each in bound.items() if ".experts." not in name} == {"bfloat16"}


def test_a_build_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(building, "compile_programs", lambda *arguments: {})
    lines = []
    choices = {"target": "inductor", "device": "cpu", "dtype": "bfloat16", "report": lines.append}
    manifest = build_engine(TINY, tmp_path / "plain", **choices)
    assert "expert weights plain (a CPU would unpack them whenever they are read)" in lines
    assert manifest.weights[GATE_UP].transform == "cast"
    manifest = build_engine(TINY, tmp_path / "packed", expert_weights="packed", **choices)
    assert "expert weights packed (asked for)" in lines
    assert manifest.weights[GATE_UP].transform == "arrange"
    assert manifest.weights[DOWN].arrangement == Arrangement(format="packed", halves=1)


def test_the_command_line_refuses_in_one_line(tmp_path):
    command = ["build", str(TINY), str(tmp_path / "e"), "--device", "cpu", "--dtype", "float32", "--expert-weights", "packed"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: expert_weights: got 'packed', expected 'plain': the engine's dtype is float32")


def test_fp8_checkpoints_are_not_packed(tmp_path):
    quantized = tmp_path / "fp8"
    quantize_checkpoint(random_checkpoint(tmp_path / "original"), quantized)
    with pytest.raises(BuildError, match=r"got 'packed', expected 'plain': the checkpoint's are float8_e4m3fn"):
        build_engine(quantized, tmp_path / "e", device="cpu", dtype="bfloat16", expert_weights="packed")


# -- What it takes


def test_memory_of_the_real_model(tmp_path):
    """11.35 GB less: on a card of 80 GB 83 sequences of 8,192 tokens find room where 58 did."""
    plain, packed = (
        write_manifest(SHAPE_26B, tmp_path / choice, expert_weights=choice, max_sequences=128) for choice in ("plain", "packed")
    )

    def most(manifest: Manifest) -> int:
        return capacities(manifest, parse_bytes("80GB"), device_type="cuda", lengths=[8192])[0].num_sequences

    limits = EngineLimits(max_sequences=1, max_cached_tokens=1)
    saved = plan_memory(plain, limits).weights_bytes - plan_memory(packed, limits).weights_bytes
    # 12 bits for 16, and a scale of 32 bits for each row of experts.
    assert saved == 30 * 128 * (3 * 2816 * 704 // 2 - 4 * (2 * 704 + 2816))
    assert (most(plain), most(packed)) == (58, 83)
    result = CliRunner().invoke(app, ["manifest", str(SHAPE_26B), str(tmp_path / "m"), "--expert-weights", "packed"])
    assert result.exit_code == 0


# -- What is generated


@pytest.mark.parametrize("length", [3, 2 * WINDOW + 1])
def test_random_checkpoints_generate_what_their_rounded_numbers_do(length, tmp_path):
    original = random_checkpoint(tmp_path / "original", seed=7)
    rounded = with_rounded_experts(original, tmp_path / "rounded")
    results = [
        llm_of(checkpoint, weights).generate([prompt_of(length)], SamplingConfig(seed=length, **RANDOM))[0]
        for checkpoint, weights in ((original, "packed"), (rounded, "plain"))
    ]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].num_steps == results[1].num_steps


def test_packed_weights_are_loaded_as_they_were_packed():
    session = network_session(TINY, dtype="bfloat16", expert_weights="packed")
    stored = load_file(TINY / "model.safetensors")
    bound = dict(zip(session.manifest.programs["denoise"].weights, session._weights["denoise"], strict=True))
    assert torch.equal(bound[GATE_UP], pack(stored[GATE_UP].bfloat16(), halves=2))
    assert torch.equal(bound[DOWN], pack(stored[DOWN].bfloat16()))


def test_answers_are_those_of_the_numbers_and_as_right_as_before(rounded, render):
    asked = list(itertools.islice(questions(2027, held_out=True), NUM_QUESTIONS))
    prompts = [render(question) for question in asked]
    sampling = [SamplingConfig(max_tokens=160, skip_special_tokens=False, seed=seed) for seed in range(NUM_QUESTIONS)]
    packed, plain, before = (
        llm_of(checkpoint, weights, max_sequences=NUM_QUESTIONS).generate(prompts, sampling)
        for checkpoint, weights in ((TINY, "packed"), (rounded, "plain"), (TINY, "plain"))
    )
    assert [result.token_ids for result in packed] == [result.token_ids for result in plain]
    right = [
        sum(result.text == question.answer for result, question in zip(results, asked, strict=True))
        for results in (packed, before)
    ]
    assert right[0] >= right[1] >= NUM_QUESTIONS - 1


def llm_of(checkpoint, expert_weights: str, **limits) -> LLM:
    session = network_session(checkpoint, dtype="bfloat16", expert_weights=expert_weights)
    defaults = GenerationDefaults.from_json(checkpoint / "generation_config.json")
    return LLM.from_engine(
        Engine(session, Tokenizer.from_file(str(checkpoint / "tokenizer.json")), defaults, EngineLimits(**limits))
    )

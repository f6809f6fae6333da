"""Engines whose experts' bfloat16 weights are stored in fewer bits, 12 (packed) or 4: when they are, how they are loaded, and
that generations are those of the numbers that the weights stand for."""

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
from plugins.moe.arranging import BLOCK, HALVES
from plugins.moe.formats import in_format
from plugins.moe.int4 import from_int4, int4_shape
from plugins.moe.packing import packed_shape, unpack

SHAPE_26B = TINY.parent / "diffusiongemma-26B-A4B"
GATE_UP, DOWN = "model.decoder.layers.0.experts.gate_up_proj", "model.decoder.layers.0.experts.down_proj"
NUM_QUESTIONS = 20


def with_rounded_experts(checkpoint, directory, stored: str):
    """The checkpoint with the numbers that its experts stand for once they are stored so."""
    shutil.copytree(checkpoint, directory)
    tensors, numbers = load_file(directory / "model.safetensors"), {"packed": unpack, "int4": from_int4}[stored]
    for name, tensor in tensors.items():
        if is_of_experts(name):
            halves = HALVES[name.rpartition(".")[2]]
            formed = in_format(tensor.bfloat16(), stored, halves)
            tensors[name] = numbers(formed, *tensor.shape[1:], halves).to(tensor.dtype)
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


def test_they_have_4_bits_where_that_is_asked_for():
    model = read_model_config(TINY)
    for choices in ({}, {"dtype": "float32"}, {"device": "cpu"}, {"device": "cpu", "dtype": "float32"}):
        assert chosen(model, "int4", **choices) == "int4"
    in_fp8 = model.model_copy(update={"experts_dtype": "float8_e4m3fn"})
    for each, choices in [(model, {"target": "tensorrt"}), (model, {"keep_onnx": True}), (in_fp8, {})]:
        with pytest.raises(BuildError, match="expert_weights: got 'int4', expected 'plain': "):
            chosen(each, "int4", **choices)


def test_the_format_follows_device_and_rows():
    model = read_model_config(TINY)
    in_fp8 = model.model_copy(update={"experts_dtype": "float8_e4m3fn"})

    def wanted(config: ModelConfig, **choices) -> str | None:
        return experts_format(config, BuildConfig(target="inductor", dtype="bfloat16", **choices))

    assert wanted(model) is wanted(model, device="cuda") is wanted(in_fp8) is None
    assert wanted(model, expert_weights="packed") == "packed"
    assert wanted(model, expert_weights="int4") == "int4"
    assert wanted(in_fp8, device="cuda") == "wide"
    assert wanted(in_fp8, device="cuda", expert_activations="float8") == "narrow"


@pytest.mark.parametrize(("stored", "shape_of", "dtype"), [("packed", packed_shape, "int32"), ("int4", int4_shape, "int16")])
def test_what_programs_are_called_with(stored, shape_of, dtype):
    model = read_model_config(SHAPE_26B)
    build = BuildConfig(target="inductor", dtype="bfloat16", expert_weights=stored)
    bound = bound_weights(all_weights(model), model, build)
    assert bound[GATE_UP].shape == shape_of((128, 1408, 2816), 2)
    assert bound[DOWN].shape == shape_of((128, 2816, 704), 1)
    assert bound[GATE_UP].dtype == bound[DOWN].dtype == dtype
    assert (bound[GATE_UP].arrangement.halves, bound[DOWN].arrangement.halves) == (2, 1)
    assert {each.dtype for name, each in bound.items() if ".experts." not in name} == {"bfloat16"}


def test_they_leave_no_other_target(monkeypatch, tmp_path):
    """Where TensorRT would be chosen."""
    asked = []
    monkeypatch.setattr(building, "choose_target", lambda target, device: asked.append(target) or ("inductor", "it is here"))
    monkeypatch.setattr(building, "compile_programs", lambda *arguments: {})
    lines = []
    for stored in ("auto", "packed", "int4"):
        build_engine(TINY, tmp_path / stored, device="cpu", dtype="bfloat16", expert_weights=stored, report=lines.append)
    assert asked == ["auto", "inductor", "inductor"]
    assert [line.partition(",")[0] for line in lines if line.startswith("target")] == [
        "target inductor (it is here)",
        "target inductor (the experts' weights are packed)",
        "target inductor (the experts' weights are int4)",
    ]


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


def test_fp8_checkpoints_are_neither(tmp_path):
    quantized = tmp_path / "fp8"
    quantize_checkpoint(random_checkpoint(tmp_path / "original"), quantized)
    with pytest.raises(BuildError, match=r"got 'packed', expected 'plain': the checkpoint's are float8_e4m3fn"):
        build_engine(quantized, tmp_path / "e", device="cpu", dtype="bfloat16", expert_weights="packed")


# -- What it takes


def test_memory_of_the_real_model(tmp_path):
    """Packed 11.35 GB less: on a card of 80 GB 83 sequences of 8,192 tokens find room where 57 did. In 4 bits 32.8 GB less: 130
    there, and 6 on a card of 24 GB."""
    plain, packed, int4 = (
        write_manifest(SHAPE_26B, tmp_path / choice, expert_weights=choice, max_sequences=256)
        for choice in ("plain", "packed", "int4")
    )

    def most(manifest: Manifest, memory: str = "80GB") -> int:
        return capacities(manifest, parse_bytes(memory), device_type="cuda", lengths=[8192])[0].num_sequences

    limits = EngineLimits(max_sequences=1, max_cached_tokens=1)
    saved = plan_memory(plain, limits).weights_bytes - plan_memory(packed, limits).weights_bytes
    # 12 bits for 16, and a scale of 32 bits for each row of experts.
    assert saved == 30 * 128 * (3 * 2816 * 704 // 2 - 4 * (2 * 704 + 2816))
    assert (most(plain), most(packed), most(int4)) == (57, 83, 130)
    saved = plan_memory(plain, limits).weights_bytes - plan_memory(int4, limits).weights_bytes
    assert saved == 30 * 128 * 3 * 2816 * 704 * 23 // 16  # 4.5 bits for 16
    assert most(int4, "24GB") == 6
    result = CliRunner().invoke(app, ["manifest", str(SHAPE_26B), str(tmp_path / "m"), "--expert-weights", "packed"])
    assert result.exit_code == 0


# -- What is generated


@pytest.mark.parametrize(("stored", "dtype"), [("packed", "bfloat16"), ("int4", "bfloat16"), ("int4", "float32")])
@pytest.mark.parametrize("length", [3, 2 * WINDOW + 1])
def test_random_checkpoints_generate_what_their_rounded_numbers_do(length, stored, dtype, tmp_path):
    # Whole blocks: the zeros that fill one join the sums, and products on CPUs of AVX2 then round otherwise.
    original = random_checkpoint(tmp_path / "original", seed=7, moe_intermediate_size=BLOCK)
    rounded = with_rounded_experts(original, tmp_path / "rounded", stored)
    results = [
        llm_of(checkpoint, weights, dtype).generate([prompt_of(length)], SamplingConfig(seed=length, **RANDOM))[0]
        for checkpoint, weights in ((original, stored), (rounded, "plain"))
    ]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].num_steps == results[1].num_steps


@pytest.mark.parametrize("stored", ["packed", "int4"])
def test_weights_are_loaded_as_they_are_formed(stored):
    session = network_session(TINY, dtype="bfloat16", expert_weights=stored)
    tensors = load_file(TINY / "model.safetensors")
    bound = dict(zip(session.manifest.programs["denoise"].weights, session._weights["denoise"], strict=True))
    assert torch.equal(bound[GATE_UP], in_format(tensors[GATE_UP].bfloat16(), stored, 2))
    assert torch.equal(bound[DOWN], in_format(tensors[DOWN].bfloat16(), stored, 1))


@pytest.mark.parametrize("stored", ["packed", "int4"])
def test_answers_are_those_of_the_numbers_and_as_right_as_before(stored, tmp_path, render):
    rounded = with_rounded_experts(TINY, tmp_path / "tiny", stored)
    asked = list(itertools.islice(questions(2027, held_out=True), NUM_QUESTIONS))
    prompts = [render(question) for question in asked]
    sampling = [SamplingConfig(max_tokens=160, skip_special_tokens=False, seed=seed) for seed in range(NUM_QUESTIONS)]
    own, plain, before = (
        llm_of(checkpoint, weights, max_sequences=NUM_QUESTIONS).generate(prompts, sampling)
        for checkpoint, weights in ((TINY, stored), (rounded, "plain"), (TINY, "plain"))
    )
    assert [result.token_ids for result in own] == [result.token_ids for result in plain]
    right = [
        sum(result.text == question.answer for result, question in zip(results, asked, strict=True))
        for results in (own, before)
    ]
    assert right[0] >= right[1] >= NUM_QUESTIONS - 1


def llm_of(checkpoint, expert_weights: str, dtype: str = "bfloat16", **limits) -> LLM:
    session = network_session(checkpoint, dtype=dtype, expert_weights=expert_weights)
    defaults = GenerationDefaults.from_json(checkpoint / "generation_config.json")
    return LLM.from_engine(
        Engine(session, Tokenizer.from_file(str(checkpoint / "tokenizer.json")), defaults, EngineLimits(**limits))
    )

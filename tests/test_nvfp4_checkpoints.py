"""Published checkpoints in NVFP4: `quantize` rewrites them, and engines compute with their numbers."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from nvfp4_weights import CONFIGS, nvfp4_checkpoint, nvfp4_headers, rounded_rows, with_numbers
from safetensors.torch import load_file, save_file
from small_checkpoints import TINY, change_tensors, network_session, random_checkpoint
from sparse_checkpoint import headers_26b, sparse_checkpoint
from test_generation import RANDOM, WINDOW, prompt_of
from test_stored_experts import llm_of
from tiny_tasks import questions
from typer.testing import CliRunner

from backend import SamplingConfig
from builder import build as building
from builder.__main__ import app
from builder.build import build_engine, write_manifest
from builder.config import read_model_config
from builder.errors import BuildError
from builder.quantize import plan, quantize_checkpoint
from builder.stored_nvfp4 import StoredNvfp4
from builder.weights import all_weights, experts_format, is_of_experts, text_weights
from contract.checkpoint import Checkpoint
from contract.manifest import Arrangement, BuildConfig
from plugins.moe.arranging import HALVES
from plugins.moe.formats import in_format
from plugins.moe.fp8 import from_fp8
from plugins.moe.nvfp4 import numbers_of

EXPERTS = "model.decoder.layers.1.experts"
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
DENSE = ("model.decoder.layers.0.mlp.up_proj.weight", "model.decoder.layers.1.self_attn.q_proj.weight")
SIZES = {"hidden_size": 48, "moe_intermediate_size": 32}
NUM_QUESTIONS = 20


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("original") / "checkpoint", seed=7, **SIZES)


@pytest.fixture(scope="module", params=[False, True], ids=["modelopt", "compressed-tensors"])
def packed(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def published(original, packed):
    return nvfp4_checkpoint(original, original.parent / f"published-{packed}", packed=packed, dense=DENSE)


@pytest.fixture(scope="module")
def rewritten(published):
    output = published.with_name(f"{published.name}-rewritten")
    errors = quantize_checkpoint(published, output)
    assert all(error == 0 for of_layer in errors.values() for error in of_layer.values())
    return output


def tensors_of(checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_experts_keep_their_numbers_and_others_are_turned_back(original, rewritten, packed):
    before, after = tensors_of(original), tensors_of(rewritten)
    assert set(after) == set(before)
    for name, tensor in before.items():
        if is_of_experts(name):
            (numbers, factors), (expected, exact) = (
                numbers_of(rows) for rows in (after[name], rounded_rows(tensor, HALVES[name.rpartition(".")[2]]))
            )
            assert torch.equal(numbers, expected)
            # compressed-tensors has the inverse of a factor.
            torch.testing.assert_close(factors, exact, rtol=2e-7 if packed else 0, atol=0)
        elif name in DENSE:
            expected = from_fp8(*numbers_of(rounded_rows(tensor[None])))[0]
            torch.testing.assert_close(after[name], expected, rtol=3e-7 if packed else 0, atol=0)
        else:
            assert torch.equal(after[name], tensor)


def test_what_a_run_says(published, tmp_path):
    result = CliRunner().invoke(app, ["quantize", str(published), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "experts in NVFP4, whose numbers are kept" in result.stdout and "error of" not in result.stdout
    assert "other weights in NVFP4: 2, which become float32" in result.stdout
    assert re.search(r"scales of activations and of the cache: \d+, left out; both stay in full precision", result.stdout)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_a_build_of_one_that_is_not_rewritten_says_what_to_do(published, tmp_path):
    with pytest.raises(BuildError, match=r"expected the experts of a layer in one tensor; rewrite the checkpoint with"):
        build_engine(published, tmp_path / "engine", target="inductor", device="cpu")


def test_what_is_rewritten_is_not_rewritten_again(rewritten, tmp_path):
    with pytest.raises(BuildError, match=r"has the experts as quantize writes them; give this checkpoint to build$"):
        quantize_checkpoint(rewritten, tmp_path / "out")


def test_a_build_binds_them_in_their_format(rewritten, monkeypatch, tmp_path):
    monkeypatch.setattr(building, "compile_programs", lambda *arguments: {})
    monkeypatch.setattr(building, "compile_operators", lambda directory: None)
    lines = []
    manifest = build_engine(rewritten, tmp_path / "engine", device="cpu", report=lines.append)
    assert lines[0].startswith("target inductor (the experts' weights are NVFP4)")
    assert manifest.model.experts_dtype == "nvfp4"
    assert manifest.weights[DOWN].arrangement == Arrangement(format="nvfp4", halves=1)
    assert (manifest.weights[GATE_UP].dtype, manifest.weights[GATE_UP].transform) == ("uint8", "arrange")
    for device in ("cpu", "cuda"):
        assert experts_format(manifest.model, BuildConfig(target="inductor", dtype="bfloat16", device=device)) == "nvfp4"
    session = network_session(rewritten)
    bound = dict(zip(session.manifest.programs["denoise"].weights, session._weights["denoise"], strict=True))
    assert torch.equal(bound[GATE_UP], in_format(tensors_of(rewritten)[GATE_UP], "nvfp4", 2))


def test_refusals_of_a_build(rewritten, tmp_path):
    def refused(match: str, **choices) -> None:
        with pytest.raises(BuildError, match=match):
            build_engine(rewritten, tmp_path / "engine", **{"target": "inductor", "device": "cpu", **choices})

    refused(r"target 'tensorrt': the experts' weights are NVFP4, which only the inductor target takes", target="tensorrt")
    refused(r"--keep-onnx: the experts' weights are NVFP4", keep_onnx=True)
    refused(r"expert_activations: got 'float8', expected 'full': .* has no FP8 experts", expert_activations="float8")
    refused(r"expert_weights: got 'int4', expected 'plain': the checkpoint's are nvfp4 and stay so", expert_weights="int4")


@pytest.mark.parametrize("length", [3, 2 * WINDOW + 1])
def test_random_checkpoints_generate_what_their_numbers_do(length, original, rewritten, tmp_path):
    """In float32, so what transformers does, too (`test_generation.py`). Most of the numbers are none in bfloat16."""
    numbers = with_numbers(original, rewritten, tmp_path / "numbers")
    results = [
        llm_of(checkpoint, "plain", "float32").generate([prompt_of(length)], SamplingConfig(seed=length, **RANDOM))[0]
        for checkpoint in (rewritten, numbers)
    ]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].num_steps == results[1].num_steps


def test_answers_are_as_right_as_before(tmp_path, render):
    quantize_checkpoint(nvfp4_checkpoint(TINY, tmp_path / "published"), tmp_path / "tiny")
    asked = list(itertools.islice(questions(2027, held_out=True), NUM_QUESTIONS))
    sampling = [SamplingConfig(max_tokens=160, skip_special_tokens=False, seed=seed) for seed in range(NUM_QUESTIONS)]
    results = llm_of(tmp_path / "tiny", "plain", max_sequences=NUM_QUESTIONS).generate(
        [render(question) for question in asked], sampling
    )
    right = sum(result.text == question.answer for result, question in zip(results, asked, strict=True))
    assert right >= NUM_QUESTIONS - 1


def test_damaged_ones_are_refused(original, tmp_path):
    def refused(name: str, match: str, packed: bool = False, **changes: torch.Tensor | None) -> None:
        source = nvfp4_checkpoint(original, tmp_path / name, packed=packed)
        tensors = load_file(source / "model.safetensors")
        change_tensors(tensors, f"{EXPERTS}.3", changes)
        save_file(tensors, source / "model.safetensors")
        with pytest.raises(BuildError, match=match):
            quantize_checkpoint(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("a", r"experts\.3\.up_proj\.weight: missing, expected shape \[32, 24\]$", up_proj__weight=None)
    refused("b", r"up_proj\.weight_scale: missing, expected shape \[32, 3\]$", up_proj__weight_scale=None)
    refused("c", r"up_proj\.weight_scale_2: missing, expected shape \[\]$", up_proj__weight_scale_2=None)
    refused("d", r"down_proj\.weight_packed: missing, expected shape \[48, 16\]$", packed=True, down_proj__weight_packed=None)
    refused("e", r"up_proj\.weight: got bfloat16, expected one of uint8", up_proj__weight=torch.zeros(32, 24).bfloat16())
    refused("f", r"up_proj\.other: unexpected tensor", up_proj__other=torch.zeros(2))
    refused(
        "g",
        r"experts\.3\.down_proj\.weight: has numbers that are not finite, expected none; download",
        down_proj__weight_scale_2=torch.tensor(float("inf")),
    )


def said_to_be(checkpoint: Path, quantization: dict) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def test_sizes_that_are_no_whole_groups_are_refused(tmp_path):
    small = random_checkpoint(tmp_path / "small", moe_intermediate_size=24)
    said_to_be(small, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    with pytest.raises(BuildError, match=r"moe_intermediate_size: got 24, expected a multiple of 16, the groups of NVFP4$"):
        read_model_config(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_algo": "FP8"}, r"quant_algo: got 'FP8', expected one of NVFP4, W4A16_NVFP4"),
        ({"quant_algo": "NVFP4_AWQ"}, r"quant_algo: got 'NVFP4_AWQ', expected one of NVFP4, W4A16_NVFP4"),
        ({"quantization": {"quant_algo": "FP8"}}, r"quantization\.quant_algo: got 'FP8', expected one of NVFP4"),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 32}}, r"quantization\.group_size: got 32, expected 16"),
        ({"config_groups": {"a": {"weights": {"group_size": 32}}}}, r"a\.weights\.group_size: got 32, expected 16"),
    ],
)
def test_what_model_optimizer_does_otherwise_is_refused(change, message, original, tmp_path):
    source = nvfp4_checkpoint(original, tmp_path / "source")
    said_to_be(source, CONFIGS[False] | change)
    with pytest.raises(BuildError, match=message):
        read_model_config(source)


@pytest.mark.parametrize(("packed", "gigabytes"), [(False, 18.8), (True, 18.1)], ids=["modelopt", "compressed-tensors"])
def test_the_real_checkpoints_headers_are_understood(packed, gigabytes, tmp_path):
    """47,000 tensors in no space; NVIDIA's takes 18.8 GB, RedHatAI's has 897 that are in bfloat16. What is written has the
    experts of a layer in two tensors."""
    headers = nvfp4_headers(headers_26b(), packed=packed)
    checkpoint = sparse_checkpoint(tmp_path / "26b", headers, quantization_config=CONFIGS[packed])
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert sum(dtype == "BF16" for dtype, _ in headers.values()) == (897 if packed else 987)
    model, stored = read_model_config(checkpoint), StoredNvfp4(Checkpoint(checkpoint))
    stored.check(text_weights(model.model_copy(update={"experts_dtype": None})))
    files = plan(model, stored)
    shapes = {name: shape for file in files.values() for name, shape in file.shapes.items()}
    assert shapes[GATE_UP] == (128, 1408, 1588) and shapes[DOWN] == (128, 2816, 400)
    assert shapes == all_weights(model)
    with pytest.raises(BuildError, match=r"expected the experts of a layer in one tensor; rewrite the checkpoint with"):
        build_engine(checkpoint, tmp_path / "engine", target="inductor", device="cpu")


@pytest.mark.parametrize(
    "said", [{"quant_algo": "w4a16_nvfp4"}, {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}], ids=str
)
def test_other_ways_to_say_nvfp4(said, original, tmp_path):
    said_to_be(nvfp4_checkpoint(original, tmp_path / "source"), {"quant_method": "modelopt"} | said)
    assert read_model_config(tmp_path / "source").experts_dtype == "nvfp4"


def test_a_quantization_that_another_file_tells_of_is_asked_for(original, tmp_path):
    source = nvfp4_checkpoint(original, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(BuildError, match=r"got no quantization_config, but hf_quant_config\.json is there; copy"):
        read_model_config(source)


def changed(source: Path, **tensors: torch.Tensor) -> Path:
    """Tensors are named with two underscores for a dot."""
    content = load_file(source / "model.safetensors")
    content |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(content, source / "model.safetensors")
    return source


def test_experts_that_the_tool_left_out_are_named(original, tmp_path):
    """Dense layers alone are in NVFP4; or the experts are in one tensor, which no tool is known to write so."""
    source = nvfp4_checkpoint(original, tmp_path / "source", dense=DENSE)
    fused = {name: tensor for name, tensor in load_file(original / "model.safetensors").items() if is_of_experts(name)}
    with pytest.raises(BuildError, match=r"got the experts of a layer in one tensor of float32, expected each by itself in"):
        quantize_checkpoint(changed(source, **{name: tensor.contiguous() for name, tensor in fused.items()}), tmp_path / "out")


def test_dense_weights_that_are_not_finite_are_refused(original, tmp_path):
    source = nvfp4_checkpoint(original, tmp_path / "source", dense=DENSE)
    with pytest.raises(BuildError, match=r"layers\.0\.mlp\.up_proj\.weight: has numbers that are not finite"):
        quantize_checkpoint(changed(source, **{f"{DENSE[0]}_scale_2": torch.tensor(float("nan"))}), tmp_path / "out")


def test_odd_tensors_of_bytes_are_refused(original, tmp_path):
    vision = "model.encoder.vision_tower.odd.weight"
    for number, (name, words) in enumerate(
        {
            vision: rf"{vision}: unexpected tensor",
            "model.decoder.norm.weight": r"model\.decoder\.norm\.weight: got uint8, expected one of float32",
        }.items()
    ):
        source = nvfp4_checkpoint(original, tmp_path / str(number))
        with pytest.raises(BuildError, match=words):
            quantize_checkpoint(changed(source, **{name: torch.zeros(48, dtype=torch.uint8)}), tmp_path / "out")


def test_memory_is_that_of_4_and_a_half_bits(rewritten, original, tmp_path):
    assert write_manifest(rewritten, tmp_path / "m").weights[DOWN].shape == (12, 1, 1 * 2304 + 256)

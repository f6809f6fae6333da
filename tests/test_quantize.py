"""`python -m builder quantize`: the experts' weights in FP8, from checkpoints that are not, or that compressed-tensors made."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_checkpoints import LEAST_VISION, TINY, change_tensors, network_session, random_checkpoint
from typer.testing import CliRunner

from builder import build as building
from builder import unfinished
from builder.__main__ import app
from builder.build import build_engine
from builder.config import read_model_config
from builder.errors import BuildError
from builder.quantization import EXPERTS_ONLY
from builder.quantize import quantize_checkpoint
from builder.weights import VISION_PROJECTION, text_weights
from contract.checkpoint import Checkpoint
from plugins.moe.fp8 import from_fp8, to_fp8

EXPERTS = "model.decoder.layers.1.experts"


def every_tensor(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = Checkpoint(checkpoint)
    return {name: tensors.tensor(name) for name in tensors.names()}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("original") / "checkpoint")


@pytest.fixture(scope="module")
def quantized(original) -> Path:
    output = original.parent / "quantized"
    quantize_checkpoint(original, output)
    return output


def test_experts_become_fp8_and_nothing_else_changes(original, quantized):
    before, after = every_tensor(original), every_tensor(quantized)
    experts = {name for name in before if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert len(experts) == 6
    assert set(after) == set(before) | {f"{name}_scale" for name in experts}
    for name, tensor in before.items():
        if name in experts:
            numbers, scale = to_fp8(tensor)
            assert same(after[name], numbers)
            assert same(after[f"{name}_scale"], scale)
        else:
            assert same(after[name], tensor)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (quantized / name).read_bytes() == (original / name).read_bytes()
    assert sorted(path.name for path in quantized.parent.iterdir()) == ["checkpoint", "quantized"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in quantized.iterdir()), "only its owner can read it"


def test_the_configuration_says_so(original, quantized):
    model = read_model_config(quantized)
    assert model == read_model_config(original).model_copy(update={"experts_dtype": "float8_e4m3fn"})
    assert text_weights(model)[f"{EXPERTS}.gate_up_proj_scale"] == (12, 48)


def test_the_error_of_every_layer_is_told(original, tmp_path):
    result = CliRunner().invoke(app, ["quantize", str(original), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    tensor = every_tensor(original)[f"{EXPERTS}.down_proj"]
    error = (from_fp8(*to_fp8(tensor)) - tensor).norm() / tensor.norm()
    assert f"{error:.4f}" in result.stdout
    assert "quantizing" in result.stdout


def test_a_run_that_was_cut_off_is_continued(original, quantized, tmp_path, monkeypatch):
    save, written = unfinished.save_file, []

    def cut_off(content, path, metadata):
        if len(written) == 2:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(content, path, metadata)
        written.append(path.name)

    monkeypatch.setattr(unfinished, "save_file", cut_off)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(unfinished, "save_file", lambda *arguments: (written.append(arguments[1].name), save(*arguments)))
    lines = []
    errors = quantize_checkpoint(original, tmp_path / "out", report=lines.append)
    assert lines[0].endswith("4 files to write, 2 of them written before")
    assert len(written) == len(set(written)) == 4
    assert sorted(errors) == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    expected, actual = every_tensor(quantized), every_tensor(tmp_path / "out")
    assert all(same(actual[name], tensor) for name, tensor in expected.items())


def cut_off(original: Path, output: Path, monkeypatch) -> Path:
    """The directory of a run that was cut off when all files of tensors were written."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unfinished.Unfinished, "add", stop)
        quantize_checkpoint(original, output)
    return output.with_name(f".{output.name}.unfinished")


def test_files_that_are_not_whole_or_have_other_tensors_are_written_again(original, quantized, tmp_path, monkeypatch):
    working = cut_off(original, tmp_path / "out", monkeypatch)
    half, other, _, _ = sorted(working.glob("*.safetensors"))
    half.write_bytes(half.read_bytes()[:5000])
    save_file({"other": torch.ones(2)}, other, {"format": "pt"})
    lines = []
    errors = quantize_checkpoint(original, tmp_path / "out", report=lines.append)
    assert lines[0].endswith("4 files to write, 2 of them written before")
    assert sorted(errors) == [0, 1, 2] and all(error > 0 for of_layer in errors.values() for error in of_layer.values())
    expected, actual = every_tensor(quantized), every_tensor(tmp_path / "out")
    assert all(same(actual[name], tensor) for name, tensor in expected.items())


def test_a_file_gets_its_name_when_it_is_on_the_disk(original, tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace

    def synced(file):
        done.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        sync(file)

    def renamed(source, target):
        assert source.name in done, f"{source.name} became {target.name} before it was on the disk"
        rename(source, target)
        done.append(target.name)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    quantize_checkpoint(original, tmp_path / "out")
    before = done[: done.index("out")]
    assert {path.name for path in (tmp_path / "out").iterdir()} <= set(before)


def test_a_second_run_into_the_same_output_is_refused(original, tmp_path, monkeypatch):
    output, save, lines = tmp_path / "out", unfinished.save_file, []

    def meanwhile(*arguments):
        lines.append(CliRunner().invoke(app, ["quantize", str(original), str(output)]).stderr)
        save(*arguments)

    monkeypatch.setattr(unfinished, "save_file", meanwhile)
    quantize_checkpoint(original, output)
    assert set(lines) == {f"error: {output}: is being written by another run; wait for it, or choose another place\n"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_another_run_finishes_meanwhile_is_kept(original, tmp_path, monkeypatch):
    output, locked = tmp_path / "out", unfinished.fcntl.flock

    def finished_first(*arguments):
        output.mkdir(exist_ok=True)
        (output / "file").touch()
        locked(*arguments)

    monkeypatch.setattr(unfinished.fcntl, "flock", finished_first)
    with pytest.raises(BuildError, match="out: is there already"):
        quantize_checkpoint(original, output)
    assert [path.name for path in output.iterdir()] == ["file"]


def test_an_output_that_is_there_in_the_end_costs_no_file(original, quantized, tmp_path, monkeypatch):
    output, add, lines = tmp_path / "out", unfinished.Unfinished.add, []

    def meanwhile(*arguments):
        add(*arguments)
        output.mkdir()
        (output / "file").touch()

    with monkeypatch.context() as patched, pytest.raises(BuildError, match="out: cannot be written"):
        patched.setattr(unfinished.Unfinished, "add", meanwhile)
        quantize_checkpoint(original, output)
    assert [path.name for path in output.iterdir()] == ["file"]
    (output / "file").unlink()
    output.rmdir()
    quantize_checkpoint(original, output, report=lines.append)
    assert lines[0].endswith("4 files to write, 4 of them written before")
    assert {path.name for path in output.iterdir()} == {path.name for path in quantized.iterdir()}


def test_a_file_that_cannot_be_read_is_named(original, tmp_path, monkeypatch):
    read = Path.read_bytes

    def failing(path):
        if path.name == "tokenizer.json":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(BuildError, match=r"tokenizer\.json: cannot be read \(\[Errno 5\] Input/output error\); give access"):
        quantize_checkpoint(original, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_files_of_another_checkpoint_are_not_kept(original, tmp_path):
    working = tmp_path / ".out.unfinished"
    working.mkdir()
    (working / "source.json").write_text("{}")
    (working / "model-00001-of-00004.safetensors").write_bytes(b"of another")
    lines = []
    quantize_checkpoint(original, tmp_path / "out", report=lines.append)
    assert lines[0].endswith("0 of them written before")


def test_an_output_that_is_there_is_refused(original, tmp_path):
    result = CliRunner().invoke(app, ["quantize", str(original), str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path}: is there already; expected a new directory")


def test_a_full_disk_is_one_line(original, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(unfinished, "save_file", full)
    result = CliRunner().invoke(app, ["quantize", str(original), str(tmp_path / "out")])
    assert result.exit_code == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {tmp_path / 'out'}: cannot be written (Error while serializing: I/O error: No space left")


def test_an_output_that_is_a_link(original, quantized, tmp_path):
    link, target = tmp_path / "out", tmp_path / "far" / "out"
    link.symlink_to(target)
    quantize_checkpoint(original, link)
    assert link.is_symlink()
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in quantized.iterdir())
    assert [path.name for path in target.parent.iterdir()] == ["out"]


# -- What compressed-tensors wrote


def rewritten(original: Path, directory: Path, tensors: dict[str, torch.Tensor], **quantization) -> Path:
    """A checkpoint of these tensors that says it is compressed-tensors'."""
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = EXPERTS_ONLY["float8_e4m3fn"] | quantization
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "generation_config.json"):
        os.link(original / name, directory / name)
    return directory


def one_by_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every expert's linear layers by themselves, scales [channels, 1]: what llm-compressor makes of such models."""
    result = {}
    for name, tensor in tensors.items():
        prefix, _, projection = name.rpartition(".")
        if projection in ("gate_up_proj_scale", "down_proj_scale"):
            continue
        if projection not in ("gate_up_proj", "down_proj"):
            result[name] = tensor
            continue
        for expert, (numbers, scale) in enumerate(zip(tensor, tensors[f"{name}_scale"], strict=True)):
            parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            pieces = zip(parts, numbers.chunk(len(parts)), scale.chunk(len(parts)), strict=True)
            for part, part_numbers, part_scale in pieces:
                result[f"{prefix}.{expert}.{part}.weight"] = part_numbers
                result[f"{prefix}.{expert}.{part}.weight_scale"] = part_scale.unsqueeze(1)
    return result


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a layer in one tensor named `weight`, scales [E, channels, 1]."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj_scale"):
            result[name.removesuffix("_scale") + ".weight_scale"] = tensor.unsqueeze(2)
        else:
            result[f"{name}.weight" if "experts." in name else name] = tensor
    return result


def with_experts(tensors: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    name = f"{EXPERTS}.down_proj"
    return tensors | {name: tensors[name].repeat(2, 1, 1)[:num_experts]}


NORM = "model.decoder.norm.weight"
CHANGES = {
    r"experts\.down_proj: got shape \[14, 48, 24\], expected \[12, 48, 24\]": lambda tensors: with_experts(tensors, 14),
    r"experts\.down_proj: got shape \[8, 48, 24\], expected \[12, 48, 24\]": lambda tensors: with_experts(tensors, 8),
    r"experts\.down_proj: got I8, expected one of float32": lambda tensors: (
        tensors | {f"{EXPERTS}.down_proj": tensors[f"{EXPERTS}.down_proj"].to(torch.int8)}
    ),
    r"norm\.weight: got F64, expected one of float32": lambda tensors: tensors | {NORM: tensors[NORM].double()},
    r"norm\.weight: missing, expected shape \[48\]": lambda tensors: {
        name: tensor for name, tensor in tensors.items() if name != NORM
    },
    r"experts\.down_proj: missing, expected shape \[12, 48, 24\]": lambda tensors: {
        name: tensor for name, tensor in tensors.items() if name != f"{EXPERTS}.down_proj"
    },
    r"down_proj_scale: unexpected tensor": lambda tensors: tensors | {f"{EXPERTS}.down_proj_scale": torch.ones(12, 48)},
    r"embedding_projection\.weight: got shape \[47, ": lambda tensors: (
        tensors | {VISION_PROJECTION: tensors[VISION_PROJECTION][:-1].clone()}
    ),
    r"vision_tower\.strange: unexpected tensor": lambda tensors: (
        tensors | {"model.encoder.vision_tower.strange": tensors[NORM].clone()}
    ),
    r"strange: unexpected tensor": lambda tensors: tensors | {"model.decoder.strange": tensors[NORM].clone()},
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_source_with_other_tensors_is_refused_before_anything_is_written(message, original, tmp_path):
    source = rewritten(original, tmp_path / "source", CHANGES[message](every_tensor(original)))
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(BuildError, match=message) as raised:
        quantize_checkpoint(source, tmp_path / "out")
    assert str(raised.value).startswith(f"{source}: ") and "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["plain", "FP8"])
def test_numbers_that_are_not_finite_are_refused(value, layout, original, quantized, tmp_path):
    tensors = every_tensor(original if layout == "plain" else quantized)
    damaged = f"{EXPERTS}.down_proj" if layout == "plain" else f"{EXPERTS}.down_proj_scale"
    tensors[damaged] = tensors[damaged].clone()
    tensors[damaged][7, 5] = value
    source = rewritten(original, tmp_path / "source", tensors)
    with pytest.raises(BuildError, match=r"layers\.1\.experts\.down_proj: expert 7 has numbers that are not finite, expected"):
        quantize_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [NORM, VISION_PROJECTION])
def test_other_numbers_that_are_not_finite_are_refused(name, original, tmp_path):
    tensors = every_tensor(original)
    tensors[name] = torch.full_like(tensors[name], float("inf"))
    source = rewritten(original, tmp_path / "source", tensors)
    with pytest.raises(BuildError, match=rf"^{re.escape(name)}: has numbers that are not finite, expected none; download"):
        quantize_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bound_of_the_vision_tower_may_be_infinite_and_no_number_none(tmp_path):
    """transformers' clipped layers have such before they are trained."""
    source = random_checkpoint(tmp_path / "source", vision=LEAST_VISION | {"use_clipped_linears": True})
    tensors = every_tensor(source)
    bound = next(name for name in tensors if name.endswith(".input_max"))
    for value, is_taken in ((float("inf"), True), (float("nan"), False)):
        changed = rewritten(source, tmp_path / str(value), tensors | {bound: torch.tensor(value)})
        if is_taken:
            quantize_checkpoint(changed, tmp_path / "out")
        else:
            with pytest.raises(BuildError, match=rf"^{re.escape(bound)}: has numbers that are not finite"):
                quantize_checkpoint(changed, tmp_path / "other")


def test_more_experts_than_the_configuration_has_are_refused(original, quantized, tmp_path):
    tensors = one_by_one(every_tensor(quantized))
    more = {name.replace(".11.", ".12."): tensor.clone() for name, tensor in tensors.items() if f"{EXPERTS}.11." in name}
    source = rewritten(original, tmp_path / "source", tensors | more)
    with pytest.raises(BuildError, match=r"experts\.12\..*: unexpected tensor"):
        quantize_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("layout", [one_by_one, fused])
def test_experts_of_compressed_tensors_keep_their_numbers(layout, original, quantized, tmp_path):
    expected = every_tensor(quantized)
    source = rewritten(original, tmp_path / "source", layout(expected))
    with pytest.raises(
        BuildError, match=r"experts\.down_proj: missing, expected the experts of a layer in one tensor; rewrite"
    ):
        build_engine(source, tmp_path / "engine", target="inductor", device="cpu")
    errors = quantize_checkpoint(source, tmp_path / "out")
    assert all(error == 0 for of_layer in errors.values() for error in of_layer.values())
    actual = every_tensor(tmp_path / "out")
    assert set(actual) == set(expected)
    assert all(same(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_dense_layers_in_fp8_are_turned_back(strategy, original, quantized, tmp_path):
    name = "model.decoder.layers.0.mlp.up_proj.weight"
    tensors = every_tensor(quantized)
    numbers, scale = to_fp8(tensors[name])
    scale = scale.unsqueeze(1) if strategy == "channel" else scale[:1]
    tensors |= {name: numbers, f"{name}_scale": scale.bfloat16()}
    source = rewritten(original, tmp_path / "source", tensors)
    with pytest.raises(
        BuildError, match=r"up_proj\.weight: got float8_e4m3fn, expected no FP8 outside of the experts; rewrite"
    ):
        build_engine(source, tmp_path / "engine", target="inductor", device="cpu")
    quantize_checkpoint(source, tmp_path / "out")
    actual = every_tensor(tmp_path / "out")
    assert f"{name}_scale" not in actual
    assert torch.equal(actual[name], numbers.float() * scale.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, r"quant_method: got 'gptq', expected 'compressed-tensors' or 'modelopt'"),
        ({"format": "pack-quantized"}, r"group_0\.format: got 'pack-quantized', expected one of float-quantized"),
        ({"format": "nvfp4-pack-quantized"}, r"group_0\.weights\.num_bits: got 8, expected 4"),
        ({"kv_cache_scheme": {"num_bits": 8}}, r"kv_cache_scheme: got .*, expected nothing; it is not supported"),
        ({"config_groups": {}}, r"config_groups: got {}, expected at least one group"),
        (
            {"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "channel"}}}},
            r"a\.weights\.num_bits: got 4, expected 8",
        ),
        (
            {"config_groups": {"a": {"weights": {"strategy": "block"}}}},
            r"a\.weights\.strategy: got 'block', expected one of channel",
        ),
        ({"config_groups": {"a": {}}}, r"a\.weights: got None, expected a description of FP8 or NVFP4 weights"),
        (
            {"config_groups": {"a": {"weights": {"strategy": "channel"}, "input_activations": {"dynamic": False}}}},
            r"a\.input_activations\.dynamic: got False, expected true or no input_activations",
        ),
    ],
)
def test_other_quantizations_are_refused(change, message, original, tmp_path):
    source = rewritten(original, tmp_path / "source", every_tensor(original), **change)
    with pytest.raises(BuildError, match=message):
        read_model_config(source)


def test_damaged_experts_are_named(original, quantized, tmp_path):
    def refused(name: str, match: str, **changes: torch.Tensor | None) -> None:
        tensors = one_by_one(every_tensor(quantized))
        change_tensors(tensors, f"{EXPERTS}.3", changes)
        with pytest.raises(BuildError, match=match):
            quantize_checkpoint(rewritten(original, tmp_path / name, tensors), tmp_path / "out")
        assert not (tmp_path / ".out.unfinished").exists()

    refused("a", r"experts\.3\.up_proj\.weight: missing, expected shape \[24, 48\]$", up_proj__weight=None)
    refused("b", r"up_proj\.weight: in FP8 without .*up_proj\.weight_scale", up_proj__weight_scale=None)
    refused("c", r"in FP8 or not, expected the same of .*up_proj\.weight", up_proj__weight=torch.zeros(24, 48))
    refused("d", r"scale: got shape \[7\], expected a scale for each of 24 channels", up_proj__weight_scale=torch.ones(7))
    refused(
        "e",
        r"experts\.3\.up_proj\.weight: got shape \[23, 48\], expected \[24, 48\]$",
        up_proj__weight=torch.zeros(23, 48).to(torch.float8_e4m3fn),
        up_proj__weight_scale=torch.ones(23, 1),
    )
    refused("f", r"experts\.3\.up_proj\.input_scale: a fixed scale of activations", up_proj__input_scale=torch.ones(1))


# -- What an engine does with it


def test_programs_bind_fp8_experts(quantized):
    session = network_session(quantized)
    weights = session.manifest.weights
    assert (weights[f"{EXPERTS}.down_proj"].dtype, weights[f"{EXPERTS}.down_proj"].transform) == ("float8_e4m3fn", "none")
    assert weights[f"{EXPERTS}.down_proj_scale"].dtype == "float32"
    assert f"{EXPERTS}.gate_up_proj_scale" in session.manifest.programs["encode"].weights


def test_refusals_of_a_build(original, quantized, tmp_path):
    def refused(checkpoint: Path, match: str, **choices) -> None:
        with pytest.raises(BuildError, match=match):
            build_engine(checkpoint, tmp_path / "engine", **{"target": "inductor", "device": "cpu", **choices})

    refused(
        quantized, r"target 'tensorrt': the experts' weights are FP8, which only the inductor target takes", target="tensorrt"
    )
    refused(quantized, r"--keep-onnx: the experts' weights are FP8", keep_onnx=True)
    refused(original, r"expert_activations: got 'float8', expected 'full': .* has no FP8 experts", expert_activations="float8")


def test_a_build_says_what_it_does_with_the_experts(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "compile_programs", lambda *arguments: {})
    monkeypatch.setattr(building, "compile_operators", lambda directory: None)
    lines = []
    choices = {"target": "auto", "device": "cpu", "expert_activations": "float8"}
    manifest = build_engine(quantized, tmp_path / "engine", report=lines.append, **choices)
    assert lines[0].startswith("target inductor (the experts' weights are FP8)")
    assert "experts float8_e4m3fn, expert activations float8" in lines
    assert (manifest.model.experts_dtype, manifest.build.expert_activations) == ("float8_e4m3fn", "float8")


def test_experts_that_are_not_fp8_after_all(original, tmp_path):
    tensors = every_tensor(original)
    scales = {f"{name}_scale": torch.ones(tensor.shape[:2]) for name, tensor in tensors.items() if "experts." in name}
    source = rewritten(original, tmp_path / "source", tensors | scales)
    with pytest.raises(BuildError, match=r"experts\.down_proj: got float32, expected float8_e4m3fn"):
        build_engine(source, tmp_path / "engine", target="inductor", device="cpu")


def test_channels_have_the_error_of_blocks():
    """Why scales are those of channels: FP8 has an exponent of its own, and only what is near 0 gains from finer scales."""
    for name, tensor in every_tensor(TINY).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        channels = (from_fp8(*to_fp8(tensor)) - tensor).norm()
        blocks = tensor.unflatten(2, (-1, 32)).unflatten(1, (-1, 32)).transpose(2, 3).flatten(3)
        assert channels <= 1.02 * (from_fp8(*to_fp8(blocks)) - blocks).norm()

"""The builder's reading, checking and writing; every message has a case here."""

import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import LEAST_VISION, TINY, random_checkpoint
from sparse_checkpoint import sparse_checkpoint
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from typer.testing import CliRunner

from backend.session import Session
from builder import build as building
from builder.__main__ import app, main
from builder.build import build_engine, write_manifest
from builder.config import read_model_config
from builder.errors import BuildError
from builder.export import export_program, signatures, size_limits
from builder.network import rope_frequencies
from builder.targets import inductor
from builder.weights import (
    EMBEDDING,
    FINAL_NORM,
    VISION_PREFIXES,
    VISION_PROJECTION,
    all_weights,
    binding_shapes,
    bindings,
    text_weights,
)
from contract.checkpoint import Checkpoint, CheckpointError
from contract.manifest import BuildConfig, ManifestError, read_manifest
from contract.problems import in_few_lines, of_another_model

REAL = Path(__file__).parent.parent / "checkpoints" / "diffusiongemma-26B-A4B"

DEEP = pytest.param("[" * 100_000, id="nested deeply")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("sharded"), max_shard_size="200KB")


@pytest.fixture
def checkpoint(sharded, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "checkpoint"))


def edit_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# -- The real checkpoint's facts


def test_real_config():
    model = read_model_config(REAL)
    assert (model.num_layers, model.layer_types.count("full_attention")) == (30, 5)
    full, sliding = model.attention["full_attention"], model.attention["sliding_attention"]
    assert (full.head_dim, full.num_kv_heads, full.window, full.has_v_proj, full.rope.num_angles) == (512, 2, 0, False, 64)
    assert (sliding.head_dim, sliding.num_kv_heads, sliding.window, sliding.has_v_proj) == (256, 8, 1024, True)
    assert (model.hidden_size, model.vocab_size, model.canvas_length, model.dtype) == (2816, 262144, 256, "bfloat16")
    assert (model.boi_token_id, model.image_token_id, model.eoi_token_id) == (255_999, 258_880, 258_882)
    vision = model.vision
    assert (vision.hidden_size, vision.intermediate_size, vision.num_layers, vision.head_dim) == (1152, 4304, 27, 72)
    assert (vision.num_attention_heads, vision.num_kv_heads, vision.position_embedding_size) == (16, 16, 10_240)
    assert (vision.standardize, vision.clipped, vision.rope_theta, vision.soft_tokens_per_image) == (True, False, 100.0, 280)


def test_real_tensor_names_and_shapes():
    """What the builder expects is what the checkpoint has."""
    tensors = {name: tuple(shape) for name, shape in json.loads((REAL / "tensors.json").read_text()).items()}
    assert all_weights(read_model_config(REAL)) == tensors


# -- config.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="llama"), "model_type: got 'llama', expected 'diffusion_gemma'"),
        (lambda c: c.update(dtype="float16"), "dtype: got 'float16', expected one of float32, bfloat16"),
        (lambda c: c.update(surprise=1), "surprise: unknown key"),
        (lambda c: c["text_config"].update(surprise=1), "text_config.surprise: unknown key"),
        (lambda c: c["text_config"].update(attention_bias=True), "text_config.attention_bias: got True, expected False"),
        (lambda c: c["text_config"].update(hidden_activation="silu"), "text_config.hidden_activation: got 'silu'"),
        (lambda c: c["text_config"].pop("num_experts"), "text_config.num_experts: got nothing, expected a positive integer"),
        (lambda c: c["text_config"].update(head_dim="16"), "text_config.head_dim: got '16', expected a positive integer"),
        (lambda c: c["text_config"].update(head_dim=33), "sliding_attention: got head_dim 33, expected an even number"),
        (
            lambda c: c["text_config"].update(per_layer_config={"2": {"head_dim": 17}}),
            "full_attention: got head_dim 17, expected an even number, whose halves are rotated",
        ),
        (lambda c: c["text_config"].update(top_k_experts=13), "top_k_experts: got 13, expected at most num_experts 12"),
        (lambda c: c["text_config"].update(sliding_window=1), "sliding_window: got 1, expected at least 2"),
        (lambda c: c["text_config"].update(use_bidirectional_attention="all"), "use_bidirectional_attention: got 'all'"),
        (
            lambda c: c["text_config"].update(layer_types=["sliding_attention", "chunked_attention", "full_attention"]),
            "layer_types: got 'chunked_attention', expected one of sliding_attention, full_attention",
        ),
        (lambda c: c["text_config"].update(layer_types=["full_attention"]), "layer_types: got 1 layers, expected num_hidden"),
        (lambda c: c["text_config"].update(layer_types=["sliding_attention"] * 3), "last layer is 'sliding_attention'"),
        (
            lambda c: c["text_config"]["rope_parameters"]["sliding_attention"].update(rope_type="yarn"),
            "rope_parameters.sliding_attention.rope_type: got 'yarn', expected 'default' or 'proportional'",
        ),
        (
            lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(factor=8.0),
            "rope_parameters.full_attention.factor: got 8.0, expected 1.0",
        ),
        (lambda c: c["text_config"]["rope_parameters"].pop("full_attention"), "rope_parameters.full_attention.: missing"),
        (lambda c: c["text_config"]["per_layer_config"].update({"0": {"head_dim": 8}}), "per_layer_config: expected the same"),
        (lambda c: c["text_config"].update(per_layer_config={"2": 5}), "per_layer_config: expected the same"),
        (lambda c: c["text_config"].update(per_layer_config={"2": {"head_dim": "x"}}), "per_layer_config: expected the same"),
        (lambda c: c["text_config"].update(per_layer_config=[]), "per_layer_config: got [], expected an object or null"),
        (lambda c: c["text_config"].update(global_head_dim="32"), "global_head_dim: got '32', expected a positive integer"),
        (lambda c: c["text_config"].update(head_dim=10**400), "0, expected a positive integer of at most 2147483647"),
        (
            lambda c: c["text_config"].update(num_experts=4097),
            "num_experts: got 4097, expected a positive integer of at most 4096",
        ),
        (
            lambda c: c["text_config"].update(num_hidden_layers=10**9, layer_types=None),
            "num_hidden_layers: got 1000000000, expected a positive integer of at most 4096",
        ),
        (
            lambda c: c["vision_config"].update(num_hidden_layers=10**9),
            "vision_config.num_hidden_layers: got 1000000000, expected a positive integer of at most 4096",
        ),
        (lambda c: c["text_config"].update(bos_token_id=-2), "bos_token_id: got -2, expected a token id or null"),
        (
            lambda c: c.update(eos_token_id=[1, 2**31]),
            "eos_token_id: got [1, 2147483648], expected a token id or a list of them",
        ),
        (
            lambda c: c["text_config"].update(num_global_key_value_heads="1"),
            "num_global_key_value_heads: got '1', expected a pos",
        ),
        (
            lambda c: c["text_config"].update(rms_norm_eps=None),
            "text_config.rms_norm_eps: got None, expected a positive number",
        ),
        (
            lambda c: c["text_config"].update(rms_norm_eps=10**400),
            "text_config.rms_norm_eps: got 1000000",
        ),
        (lambda c: c["text_config"].update(final_logit_softcapping="x"), "softcapping: got 'x', expected a positive number or"),
        (lambda c: c["text_config"].update(layer_types=5), "text_config.layer_types: got 5, expected a list or null"),
        (
            lambda c: c["text_config"].update(bos_token_id="<bos>"),
            "text_config.bos_token_id: got '<bos>', expected a token id or",
        ),
        (
            lambda c: c.update(eos_token_id=[1, None]),
            "eos_token_id: got [1, None], expected a token id or a list of them or null",
        ),
        (lambda c: c["text_config"].update(rope_parameters="x"), "text_config.rope_parameters: got 'x', expected an object or"),
        (
            lambda c: c["text_config"]["rope_parameters"]["full_attention"].update(partial_rotary_factor=None),
            "full_attention.partial_rotary_factor: got None, expected a number above 0 and at most 1",
        ),
        (
            lambda c: c["text_config"]["rope_parameters"]["full_attention"].pop("rope_theta"),
            "full_attention.rope_theta: got nothing, expected a positive number",
        ),
        (lambda c: c.update(vision_config="x"), "vision_config: got 'x', expected an object or null"),
        (lambda c: c.update(image_token_id=None), "image_token_id: got null, expected a token id, or vision_config null"),
        (lambda c: c.update(boi_token_id=None), "boi_token_id: got null, expected a token id, or vision_config null"),
        (lambda c: c.update(eoi_token_id=None), "eoi_token_id: got null, expected a token id, or vision_config null"),
        (
            lambda c: c.update(vision_soft_tokens_per_image=100),
            "vision_soft_tokens_per_image: got 100, expected one of 70, 140",
        ),
        (
            lambda c: c["vision_config"].update(rope_parameters=[1]),
            "vision_config.rope_parameters: got [1], expected an object",
        ),
        (lambda c: c["vision_config"].update(standardize="no"), "vision_config.standardize: got 'no', expected true or false"),
        (lambda c: c["vision_config"].update(rms_norm_eps=None), "vision_config.rms_norm_eps: got None, expected a positive"),
        (lambda c: c["vision_config"].update(surprise=1), "vision_config.surprise: unknown key"),
        (lambda c: c["vision_config"].update(model_type="siglip"), "vision_config.model_type: got 'siglip', expected 'gemma4"),
        (lambda c: c["vision_config"].update(attention_bias=True), "vision_config.attention_bias: got True, expected False"),
        (lambda c: c["vision_config"].update(hidden_activation="silu"), "vision_config.hidden_activation: got 'silu'"),
        (lambda c: c["vision_config"].update(patch_size=0), "vision_config.patch_size: got 0, expected a positive integer"),
        (lambda c: c["vision_config"].update(head_dim=18), "vision_config.head_dim: got 18, expected a multiple of 4"),
        (
            lambda c: c["vision_config"].update(num_attention_heads=3, num_key_value_heads=2),
            "vision_config: num_attention_heads 3 is not a multiple of 2 key/value heads",
        ),
        (
            lambda c: c["vision_config"]["rope_parameters"].update(rope_type="default"),
            "vision_config.rope_parameters.rope_type: got 'default', expected 'axial'",
        ),
    ],
)
def test_config_is_refused_by_name(change, message, checkpoint):
    edit_json(checkpoint / "config.json", change)
    with pytest.raises(BuildError) as raised:
        read_model_config(checkpoint)
    assert message in str(raised.value)
    assert all(line.startswith(str(checkpoint)) for line in str(raised.value).splitlines())


def test_all_problems_of_a_config_at_once(checkpoint):
    def change(config):
        config["text_config"]["rope_parameters"]["full_attention"]["rope_type"] = "yarn"
        config["text_config"]["attention_bias"] = True
        config["surprise"] = 1

    edit_json(checkpoint / "config.json", change)
    with pytest.raises(BuildError) as raised:
        read_model_config(checkpoint)
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"vocab_size": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("[]", "got a JSON list, expected an object"),
    ],
    ids=["cut off", "nested deeply", "a number of 5,000 digits", "a list"],
)
def test_config_that_is_no_json_object(text, message, checkpoint):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(BuildError, match=message):
        read_model_config(checkpoint)


def image_processor(**change) -> dict:
    """As checkpoints of the family say it, but for `change`."""
    return json.loads((TINY / "processor_config.json").read_text())["image_processor"] | change


@pytest.mark.parametrize(
    ("nested", "alone", "expected"),
    [
        (None, None, 280),  # of config.json
        ({}, {"max_soft_tokens": 560}, 560),
        ({"image_processor": image_processor(max_soft_tokens=1120)}, image_processor(max_soft_tokens=560), 1120),
        ({"image_processor": image_processor(max_soft_tokens=140, size=None, do_pad=True, patch_size=None)}, None, 140),
        ({"image_processor": {}}, {"max_soft_tokens": 560}, 280),
        (None, {"image_processor_type": "Gemma4ImageProcessorPil", "patch_size": 16}, 280),
    ],
)
def test_soft_tokens_of_an_image_are_those_of_transformers(nested, alone, expected, checkpoint):
    for name, values in (("processor_config.json", nested), ("preprocessor_config.json", alone)):
        if values is not None:
            (checkpoint / name).write_text(json.dumps(values))
    assert read_model_config(checkpoint).vision.soft_tokens_per_image == expected
    if nested is not None or alone:
        theirs = Gemma4ImageProcessorPil.from_pretrained(checkpoint)
        assert theirs.max_soft_tokens == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_soft_tokens": 100}, "max_soft_tokens: got 100, expected one of 70, 140, 280, 560, 1120"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type: got 'SiglipImageProcessor', expected Gemma4"),
        ({"do_resize": False}, "do_resize: got False, expected True; images are not made ready otherwise"),
        ({"resample": 2}, "resample: got 2, expected 3; images"),
        ({"rescale_factor": 1.0}, "rescale_factor: got 1.0, expected 1 / 255; images"),
        ({"do_normalize": True, "image_mean": [0.5] * 3}, "do_normalize: got True, expected False; images"),
        ({"patch_size": 14}, "patch_size: got 14, expected 16; config.json says so of the vision tower"),
        ({"pooling_kernel_size": 2}, "pooling_kernel_size: got 2, expected 3; config.json says so"),
    ],
)
def test_images_that_are_made_ready_otherwise_are_refused(change, message, checkpoint):
    for name, where in (("preprocessor_config.json", ""), ("processor_config.json", "image_processor.")):
        values = image_processor(**change)
        (checkpoint / name).write_text(json.dumps({"image_processor": values} if where else values))
        with pytest.raises(BuildError) as raised:
            read_model_config(checkpoint)
        assert str(raised.value).startswith(f"{checkpoint / name}: {where}{message}")
    of_text_alone = {"vision_config": None, "vision_soft_tokens_per_image": 256}  # where nobody asks
    edit_json(checkpoint / "config.json", lambda config: config.update(of_text_alone))
    assert read_model_config(checkpoint).vision is None


def test_normalization_that_changes_nothing_is_not_refused(checkpoint):
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(image_processor(do_normalize=True)))
    assert read_model_config(checkpoint).vision.soft_tokens_per_image == 70


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "got a JSON list, expected an object"),
        ('{"image_processor": [1]}', "image_processor: got a JSON list, expected an object"),
    ],
)
def test_a_processor_config_that_is_no_json_object(text, message, checkpoint):
    (checkpoint / "processor_config.json").write_text(text)
    with pytest.raises(BuildError, match=re.escape(f"{checkpoint / 'processor_config.json'}: {message}")):
        read_model_config(checkpoint)
    (checkpoint / "processor_config.json").unlink()
    (checkpoint / "processor_config.json").mkdir()
    with pytest.raises(BuildError, match=r"processor_config\.json: cannot be read"):
        read_model_config(checkpoint)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(BuildError, match="no such file; expected the directory of a Hugging Face checkpoint"):
        read_model_config(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(BuildError, match=r"model\.gguf: is a file; expected the directory of a Hugging Face checkpoint"):
        read_model_config(tmp_path / "model.gguf")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BuildError, match=r"config\.json cannot be read \(Is a directory\); expected the directory"):
        read_model_config(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("loop", "Too many levels of symbolic links"), ("x" * 300, "File name too long")):
        with pytest.raises(BuildError, match=rf"{name}: config\.json cannot be read \({reason}\); expected the directory"):
            read_model_config(tmp_path / name)


def test_full_layers_of_the_sliding_layers_shape(tmp_path):
    """transformers then writes no override; the names and shapes are those of its own weights."""
    checkpoint = random_checkpoint(tmp_path, global_head_dim=16, num_global_key_value_heads=2)
    assert json.loads((checkpoint / "config.json").read_text())["text_config"]["per_layer_config"] == {}
    model = read_model_config(checkpoint)
    full, sliding = model.attention["full_attention"], model.attention["sliding_attention"]
    assert (full.head_dim, full.num_kv_heads) == (sliding.head_dim, sliding.num_kv_heads) == (16, 2)
    Checkpoint(checkpoint).check(all_weights(model))
    edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(per_layer_config=None))
    assert read_model_config(checkpoint) == model


# -- Tensors


def shards(checkpoint: Path) -> list[Path]:
    found = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


def test_missing_and_truncated_shards_are_listed_together(checkpoint):
    first, second, *_ = shards(checkpoint)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as raised:
        Checkpoint(checkpoint)
    missing, truncated = str(raised.value).splitlines()
    assert f"{first}: missing" in missing
    assert f"{second}: truncated or damaged" in truncated


@pytest.mark.parametrize("num_again", [1, 2])
def test_a_tensor_in_two_shards(num_again, checkpoint):
    """Tools disagree about which of the two it is, whatever the index says."""
    first, _, third, *_ = shards(checkpoint)
    of_first, of_third = (load_file(path) for path in (first, third))
    again = dict(sorted(of_first.items())[:num_again])
    assert len(again) == num_again
    save_file(of_third | {name: tensor + 1 for name, tensor in again.items()}, third)
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(checkpoint)
    held = "a tensor of another file" if num_again == 1 else "2 tensors of other files"
    assert str(refused.value) == (
        f"{third}: holds {held}, {next(iter(again))} of {first.name}, expected each in one; download the checkpoint again"
    )


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{",
        DEEP,
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": 1, "b": "c"}}',
        '{"weight_map": {"a": "../other/model.safetensors"}}',
        '{"weight_map": {"a": "/other/model.safetensors"}}',
    ],
)
def test_damaged_index(text, checkpoint):
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        Checkpoint(checkpoint)


def test_an_index_with_a_name_that_no_file_can_have(checkpoint):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    with pytest.raises(CheckpointError, match=r"x: missing; model\.safetensors\.index\.json lists it"):
        Checkpoint(checkpoint)


def test_a_single_file_comes_before_a_leftover_index(checkpoint):
    save_file({"new": torch.ones(1)}, checkpoint / "model.safetensors")
    assert set(Checkpoint(checkpoint).names()) == {"new"}
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    save_file({"new": torch.ones(1)}, checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"old": "model-00001-of-00002.safetensors"}}')
    assert set(Checkpoint(checkpoint).names()) == {"new"}


def test_dtypes_that_cannot_be_loaded_are_listed_together(checkpoint, tmp_path):
    opened = Checkpoint(checkpoint)
    tensors = {name: opened.tensor(name).clone() for name in opened.names()}
    for path in checkpoint.glob("model*"):
        path.unlink()
    names = sorted(name for name in tensors if name.startswith("model.decoder.layers.1.mlp."))
    names_of_others = [name for name in tensors if name.startswith("model.decoder.layers.2.mlp.")]
    dtypes = (torch.float64, torch.int8, torch.float8_e4m3fn)
    half = "model.decoder.norm.weight"
    tensors |= {name: tensors[name].to(dtype) for name, dtype in zip(names, dtypes, strict=True)}
    tensors |= {half: tensors[half].half()} | {name: tensors[name].double() for name in names_of_others}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for make in (build_engine, write_manifest):
        with pytest.raises(BuildError) as raised:
            make(checkpoint, tmp_path / "e")
        *lines, last = str(raised.value).splitlines()
        assert last == f"{checkpoint}: … and 3 more like these"
        for line, name, got in zip(lines, names, ("F64", "I8", "float8_e4m3fn"), strict=True):
            assert f"{name}: got {got}, expected one of float32, bfloat16, float16" in line


def test_no_tensors_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"found neither model.safetensors nor"):
        Checkpoint(tmp_path)


def test_missing_unexpected_and_wrongly_shaped_tensors_are_listed_together(sharded):
    tensors = Checkpoint(sharded)
    expected = {name: tensors.shape(name) for name in tensors.names()}
    expected["new"] = (1,)
    expected["model.decoder.norm.weight"] = (7,)
    del expected["model.decoder.embed_tokens.weight"]
    with pytest.raises(CheckpointError) as raised:
        tensors.check(expected)
    missing, unexpected, shape = str(raised.value).splitlines()
    assert "new: missing, expected shape [1]" in missing
    assert "model.decoder.embed_tokens.weight: unexpected tensor" in unexpected
    assert "model.decoder.norm.weight: got shape [48], expected [7]" in shape


@pytest.fixture(scope="module")
def of_another_width(tmp_path_factory) -> Path:
    """The 26B shapes with a config.json of narrower layers."""
    checkpoint = sparse_checkpoint(tmp_path_factory.mktemp("sparse") / "26b")
    edit_json(checkpoint / "config.json", lambda config: config["text_config"].update(hidden_size=2304))
    return checkpoint


@pytest.mark.parametrize(("command", "num_tensors"), [("build", 1047), ("manifest", 1047), ("quantize", 1047)])
def test_hundreds_of_wrong_tensors_are_told_in_a_few_lines(command, num_tensors, of_another_width, tmp_path):
    result = CliRunner().invoke(app, [command, str(of_another_width), str(tmp_path / "out")])
    assert result.exit_code == 1
    first, *shown, last = result.stderr.splitlines()
    where, named = f"error: {of_another_width}: ", re.match(r".* together: (\d+) of (\d+) ", first)
    assert first.startswith(f"{where}config.json and the tensors do not belong together: ")
    assert first.endswith(" are missing or of another shape; download both from one place")
    assert len(shown) == 3
    assert shown[0] == f"{where}model.decoder.embed_tokens.weight: got shape [262144, 2816], expected [262144, 2304]"
    assert int(named[2]) == num_tensors
    assert last == f"{where}… and {int(named[1]) - 3} more like these"


def test_the_first_of_every_kind_are_told():
    def lines(*names: str) -> list[str]:
        return in_few_lines(Path("c"), names, [], ["x"]).splitlines()

    assert lines("a", "b", "c") == ["c: a", "c: b", "c: c", "c: x"]
    assert lines("a", "b", "c", "d", "e") == ["c: a", "c: b", "c: c", "c: … and 2 more like these", "c: x"]
    assert of_another_model(5, 10) == [] and len(of_another_model(6, 10)) == 1


def test_tensors_are_mapped_not_copied(sharded):
    """Two reads of one tensor share memory with the file: both see the same address range of it, and no copy is made."""
    tensors = Checkpoint(sharded)
    name = "model.decoder.embed_tokens.weight"
    maps = Path("/proc/self/maps")
    address = tensors.tensor(name).data_ptr()
    ranges = [line.split() for line in maps.read_text().splitlines() if line.endswith(".safetensors")]
    assert any(int(low, 16) <= address < int(high, 16) for low, high in (line[0].split("-") for line in ranges))


# -- Building


@pytest.fixture
def quick(uncompiled, monkeypatch):
    """Does not trace either: what is tested here is what happens around it."""
    monkeypatch.setattr(
        "builder.compiling.export_program",
        lambda signature, model, build, minimum: type("Traced", (), {**vars(signature), "outputs": ()}),
    )


def test_build_writes_once_and_again_only_when_something_changed(quick, checkpoint, tmp_path):
    engine, lines = tmp_path / "engines" / "e", []
    manifest = build_engine(checkpoint, engine, report=lines.append)
    assert read_manifest(engine) == manifest
    assert {path.name for path in engine.iterdir()} >= {
        "manifest.json",
        "encode.pt2",
        "denoise.pt2",
        "head.pt2",
        "vision.pt2",
        "tokenizer.json",
    }
    before = (engine / "manifest.json").stat().st_mtime_ns
    build_engine(checkpoint, engine, report=lines.append)
    assert "up to date" in lines[-1]
    assert (engine / "manifest.json").stat().st_mtime_ns == before
    build_engine(checkpoint, engine, page_size=16, report=lines.append)
    assert read_manifest(engine).build.page_size == 16
    assert [path.name for path in engine.parent.iterdir()] == ["e"]


def test_an_engine_of_another_checkpoint_is_replaced_only_by_force(quick, checkpoint, tmp_path):
    engine, lines = tmp_path / "e", []
    build_engine(checkpoint, engine)
    other = random_checkpoint(tmp_path / "other", seed=1)
    before = (engine / "manifest.json").read_bytes()
    result = CliRunner().invoke(app, ["build", str(other), str(engine)])
    assert (result.exit_code, (engine / "manifest.json").read_bytes()) == (1, before)
    [line] = result.stderr.strip().splitlines()
    assert line == (
        f"error: {engine}: was built from {checkpoint}, asked for {other}; choose another directory or give --force"
    )
    assert CliRunner().invoke(app, ["build", str(other), str(engine), "--force"]).exit_code == 0
    assert read_manifest(engine).checkpoint.path == "../other"
    # Other content in the same place is the same checkpoint, trained further; the same content in another place has moved.
    shutil.rmtree(other)
    random_checkpoint(other, seed=2)
    build_engine(other, engine)
    other.rename(tmp_path / "moved")
    programs = (engine / "encode.pt2").read_bytes()
    moved = build_engine(tmp_path / "moved", engine, report=lines.append)
    assert moved.checkpoint.path == read_manifest(engine).checkpoint.path == "../moved"
    assert (engine / "encode.pt2").read_bytes() == programs
    assert not any("compiling" in line for line in lines)


def test_an_engine_that_another_build_has_written_meanwhile_is_protected(quick, checkpoint, tmp_path, monkeypatch):
    engine, other = tmp_path / "e", random_checkpoint(tmp_path / "other", seed=1)
    compile_operators, builds = building.compile_operators, []

    def beside(directory):
        if not builds:
            builds.append(None)
            builds[0] = build_engine(other, engine)
        return compile_operators(directory)

    monkeypatch.setattr(building, "compile_operators", beside)
    with pytest.raises(BuildError, match=rf"{engine}: was built from {other}, asked for {checkpoint}; choose another"):
        build_engine(checkpoint, engine)
    assert read_manifest(engine) == builds[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "e", "other"]


def test_a_path_that_is_not_utf8_is_refused(checkpoint, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff"))
    shutil.copytree(checkpoint, odd)
    with pytest.raises(BuildError, match=r"/bad\\udcff': got a path that is not UTF-8, expected one that is; rename it$"):
        build_engine(odd, tmp_path / "e")


def _of_an_older_format(manifest: dict) -> None:
    manifest.update(format_version=1, tables={})
    del manifest["files"], manifest["tools"]


@pytest.mark.parametrize(
    "change",
    [_of_an_older_format, lambda manifest: manifest.update(surprise=1), lambda manifest: manifest.update(programs={})],
    ids=["of an older format", "with a key of a newer one", "without programs"],
)
def test_an_engine_of_another_checkpoint_is_protected_whatever_its_manifest(change, quick, refused, checkpoint, tmp_path):
    engine = tmp_path / "e"
    build_engine(checkpoint, engine)
    edit_json(engine / "manifest.json", change)
    before, other = (engine / "manifest.json").read_bytes(), random_checkpoint(tmp_path / "other", seed=1)
    assert refused("build", other, engine) == (
        f"error: {engine}: was built from {checkpoint}, asked for {other}; choose another directory or give --force"
    )
    assert (engine / "manifest.json").read_bytes() == before
    assert build_engine(checkpoint, engine).programs  # of its own checkpoint it is built again
    assert build_engine(other, engine, force=True) == read_manifest(engine)


def test_files_that_are_carried_along_are_kept_current_without_compiling(quick, checkpoint, tmp_path, monkeypatch):
    engine = tmp_path / "e"
    manifest = build_engine(checkpoint, engine)
    monkeypatch.setattr("builder.build.compile_programs", None)
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.5}')
    (checkpoint / "chat_template.jinja").write_text("new")
    (checkpoint / "tokenizer_config.json").unlink()
    (engine / "tokenizer.json").unlink()
    assert build_engine(checkpoint, engine) == read_manifest(engine) == manifest
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "config.json"):
        assert (engine / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (engine / "tokenizer_config.json").exists()
    assert (engine / "denoise.pt2").read_text() == "denoise" and (engine / "operators.so").read_text() == "operators"
    lines = []
    build_engine(checkpoint, engine, report=lines.append)
    assert "up to date" in lines[-1]


def test_an_index_without_its_files_hinders_no_manifest(checkpoint, tmp_path):
    """As `hf download --include "*.json"` leaves it."""
    files = sorted(checkpoint.glob("*.safetensors"))
    for path in files[1:]:
        path.unlink()
    with pytest.raises(CheckpointError, match=f"{files[1].name}: missing"):
        write_manifest(checkpoint, tmp_path / "m")
    files[0].unlink()
    assert not write_manifest(checkpoint, tmp_path / "m").checkpoint.files


@pytest.mark.parametrize("make", [build_engine, write_manifest])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_what_it_points_to_is_written(dangling, make, quick, checkpoint, tmp_path):
    (tmp_path / "links").mkdir()
    link, target = tmp_path / "links" / "e", tmp_path / "far" / "away" / "e"
    target.parent.mkdir(parents=True)
    link.symlink_to(target)
    if not dangling:
        target.mkdir()
    make(checkpoint, link)
    assert link.is_symlink() and not target.is_symlink()
    assert (target / read_manifest(link).checkpoint.path).resolve() == checkpoint
    assert [path.name for path in target.parent.iterdir()] == ["e"]


def test_a_checkpoint_without_a_vision_tower_reads_text_alone(quick, checkpoint, tmp_path):
    """Whether its config.json speaks of one or not; but of a tower every tensor must be there."""
    opened, lines = Checkpoint(checkpoint), []
    tensors = {name: opened.tensor(name).clone() for name in opened.names()}
    for path in checkpoint.glob("model*"):
        path.unlink()
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith(VISION_PREFIXES)}
    save_file(text, checkpoint / "model.safetensors", metadata={"format": "pt"})
    manifest = build_engine(checkpoint, tmp_path / "a", report=lines.append)
    assert manifest.model.vision is None and "vision" not in manifest.programs
    assert any("no vision tower, reads text alone" in line for line in lines)
    edit_json(checkpoint / "config.json", lambda config: config.pop("vision_config"))
    assert build_engine(checkpoint, tmp_path / "b").model.vision is None
    save_file(text | {VISION_PROJECTION: tensors[VISION_PROJECTION]}, checkpoint / "model.safetensors")
    edit_json(checkpoint / "config.json", lambda config: config.update(vision_config={**LEAST_VISION}))
    missing = r"vision_tower\.encoder\.layers\.0\.input_layernorm\.weight: missing, expected shape \[16\]"
    with pytest.raises(CheckpointError, match=missing):
        build_engine(checkpoint, tmp_path / "c")


def test_a_build_that_fails_leaves_the_old_engine(quick, checkpoint, tmp_path, monkeypatch):
    engine = tmp_path / "engines" / "e"
    build_engine(checkpoint, engine)
    before = {path.name: path.read_bytes() for path in engine.iterdir()}

    def broken(program, directory):
        raise BuildError("no compiler")

    monkeypatch.setattr("builder.compiling.compiler", lambda build, model: broken)
    with pytest.raises(BuildError, match="no compiler"):
        build_engine(checkpoint, engine, force=True)
    assert {path.name: path.read_bytes() for path in engine.iterdir()} == before
    assert [path.name for path in engine.parent.iterdir()] == ["e"]


def test_a_directory_that_is_no_engine_is_not_replaced(quick, checkpoint, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.json").write_text("{}")
    with pytest.raises(BuildError, match="holds files but no manifest"):
        build_engine(checkpoint, tmp_path / "home")
    assert (tmp_path / "home" / "config.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "my web app"}',
        "[1]",
        "{",
        DEEP,
        '{"format_version": 2}',
        '{"format_version": 4, "checkpoint": {"id": 1}}',
    ],
)
def test_a_manifest_of_something_else_is_replaced_only_by_force(text, quick, checkpoint, tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text(text)
    with pytest.raises(BuildError, match=r"app: manifest\.json is none of an engine, or damaged; .* or give --force"):
        build_engine(checkpoint, tmp_path / "app")
    assert (tmp_path / "app" / "manifest.json").read_text() == text
    build_engine(checkpoint, tmp_path / "app", force=True)
    assert read_manifest(tmp_path / "app").programs


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_in_an_engine_stays(force, quick, checkpoint, tmp_path):
    """A checkpoint that was moved there, say."""
    engine = tmp_path / "e"
    build_engine(checkpoint, engine)
    moved = Path(shutil.copytree(checkpoint, engine / "checkpoint"))
    with pytest.raises(
        BuildError, match="e: holds the directory checkpoint, which no engine has; expected an engine directory"
    ):
        build_engine(moved, engine, force=force)
    assert (moved / "config.json").exists() and (engine / "denoise.pt2").exists()


@pytest.mark.parametrize("name", ["notes.txt", "tensorrt.timing_cache", "decoder.onnx", "head.pt2~"])
@pytest.mark.parametrize("while_building", [False, True])
def test_a_file_that_no_engine_has_stays(name, while_building, quick, checkpoint, tmp_path):
    """It may come while the engine is built, which takes minutes."""
    engine = tmp_path / "engines" / "e"
    before = build_engine(checkpoint, engine)

    def write(line: str) -> None:
        if while_building == ("compiling" in line):
            (engine / name).write_text("mine")

    with pytest.raises(BuildError, match=rf"e: holds the file {name}, which no engine has; expected an engine directory"):
        build_engine(checkpoint, engine, page_size=16, force=True, report=write)
    assert (engine / name).read_text() == "mine" and read_manifest(engine) == before
    assert [path.name for path in engine.parent.iterdir()] == ["e"]


@pytest.mark.parametrize("content", [b"", b"denoisE", None], ids=["cut short", "other content", "gone"])
def test_a_damaged_program_is_built_again(content, quick, checkpoint, tmp_path):
    engine, lines = tmp_path / "e", []
    build_engine(checkpoint, engine)
    (engine / "denoise.pt2").unlink()
    if content is not None:
        (engine / "denoise.pt2").write_bytes(content)
    build_engine(checkpoint, engine, report=lines.append)
    assert (engine / "denoise.pt2").read_text() == "denoise"
    assert any(line.startswith(f"{engine}/denoise.pt2: ") for line in lines)
    build_engine(checkpoint, engine, report=lines.append)
    assert "up to date" in lines[-1]


@pytest.fixture
def quick_onnx(quick, monkeypatch):
    def write_onnx(model, build, directory, report):
        for name in ("encode", "denoise", "head", "vision"):
            (directory / f"{name}.onnx").write_text(name)

    monkeypatch.setattr("builder.build.write_onnx", write_onnx)


@pytest.mark.parametrize("changed", [False, True], ids=["all else as it was", "another chat template"])
@pytest.mark.parametrize("fault", ["got 6 bytes, expected 4", "missing"])
def test_a_damaged_onnx_file_is_told_and_not_kept(fault, changed, quick_onnx, checkpoint, tmp_path):
    engine, lines = tmp_path / "e", []
    build_engine(checkpoint, engine, keep_onnx=True)
    if fault == "missing":
        (engine / "head.onnx").unlink()
    else:
        (engine / "head.onnx").write_text("broken")
    if changed:
        (checkpoint / "chat_template.jinja").write_text("new")
    manifest = build_engine(checkpoint, engine, report=lines.append)
    assert lines[-4:] == [
        f"{engine}/head.onnx: {fault}",
        f"head.onnx will not be in {engine}; --keep-onnx writes them again",
        "the programs are up to date, other files are not: copying the programs and the checkpoint's files",
        f"engine {engine} written",
    ]
    assert read_manifest(engine) == manifest and "head.onnx" not in manifest.files
    assert {path.name for path in engine.glob("*.onnx")} == {"denoise.onnx", "encode.onnx", "vision.onnx"}
    build_engine(checkpoint, engine, report=lines.append)
    assert "up to date" in lines[-1]
    build_engine(checkpoint, engine, keep_onnx=True)
    assert (engine / "head.onnx").read_text() == "head"


def test_onnx_files_stay_with_their_programs(quick_onnx, checkpoint, tmp_path):
    engine, lines = tmp_path / "e", []

    def onnx_files() -> list[str]:
        return sorted(path.name for path in engine.glob("*.onnx"))

    build_engine(checkpoint, engine, keep_onnx=True)
    assert len(onnx_files()) == 4
    (checkpoint / "chat_template.jinja").write_text("new")
    build_engine(checkpoint, engine, report=lines.append)
    assert len(onnx_files()) == 4 and not any("compiling" in line for line in lines)
    build_engine(checkpoint, engine, keep_onnx=True)
    assert len(onnx_files()) == 4
    build_engine(checkpoint, engine, page_size=16, report=lines.append)
    assert onnx_files() == []
    dropped = "denoise.onnx, encode.onnx, head.onnx, vision.onnx"
    assert f"{dropped} will not be in {engine}; --keep-onnx writes them again" in lines


def test_a_damaged_tokenizer_is_told_before_anything_long(refused, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("builder.build.compile_operators", None)
    path = checkpoint / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:999])
    line = refused("build", checkpoint, tmp_path / "e")
    assert line.startswith(f"error: {path}: damaged (") and line.endswith("); download it again")
    path.unlink()
    assert refused("build", checkpoint, tmp_path / "e") == (
        f"error: {checkpoint}: missing tokenizer.json; download the checkpoint again"
    )
    path.mkdir()
    line = refused("build", checkpoint, tmp_path / "e")
    assert line == f"error: {path}: cannot be read ([Errno 21] Is a directory: '{path}'); give access to it, or replace it"
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


def test_links_to_nothing_are_told(refused, quick, checkpoint, tmp_path):
    """Of files that a checkpoint may lack, too: Hugging Face's cache has links."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = checkpoint / name
        path.unlink(missing_ok=True)
        path.symlink_to("../blobs/1")
        for command in (["build", checkpoint], ["quantize", checkpoint]):
            line = refused(*command, tmp_path / "made")
            assert line.startswith(f"error: {path}: cannot be read ([Errno 2] No such file or directory")
        path.unlink()
    path = checkpoint / "config.json"
    path.unlink()
    path.symlink_to("../blobs/1")
    assert refused("build", checkpoint, tmp_path / "made") == (
        f"error: {path}: is a link to ../blobs/1, which is not there; let it be seen here, or download it again"
    )


def test_the_operators_are_compiled_first(quick, checkpoint, tmp_path, monkeypatch):
    """They need the newest compiler, and take seconds where programs take minutes."""

    def too_old(directory):
        raise BuildError("operators.so: cannot be compiled")

    monkeypatch.setattr("builder.build.compile_operators", too_old)
    monkeypatch.setattr("builder.build.compile_programs", None)
    with pytest.raises(BuildError, match=r"operators\.so: cannot be compiled"):
        build_engine(checkpoint, tmp_path / "e")


def test_a_failure_of_compiling_is_not_called_one_of_writing(quick, checkpoint, tmp_path, monkeypatch):
    def broken(program, directory):
        raise FileNotFoundError("nvcc")

    monkeypatch.setattr("builder.compiling.compiler", lambda build, model: broken)
    with pytest.raises(FileNotFoundError, match="nvcc"):
        build_engine(checkpoint, tmp_path / "e")


@pytest.fixture
def refused():
    """Runs a command and returns its one line on standard error."""

    def run(*arguments) -> str:
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result.exception
        [line] = result.stderr.strip().splitlines()
        return line

    return run


@pytest.mark.parametrize("command", ["build", "manifest", "quantize"])
def test_a_path_with_control_characters_is_refused_in_one_line(command, refused, checkpoint, tmp_path):
    odd = tmp_path / "a\nb\x1b[2J"
    for arguments in ((odd, tmp_path / "e"), (checkpoint, odd)):
        line = refused(command, *arguments)
        assert line == f"error: {str(odd)!r}: got a path with control characters, expected one without; rename it"


def test_what_a_checkpoint_names_is_told_in_one_line(refused, checkpoint, tmp_path):
    config = (checkpoint / "config.json").read_text()
    edit_json(checkpoint / "config.json", lambda values: values.update({"a\nb\r": 1}))
    line = refused("build", checkpoint, tmp_path / "e")
    assert r"config.json: a\nb\r: unknown key" in line
    (checkpoint / "config.json").write_text(config)
    first = shards(checkpoint)[0]
    save_file(load_file(first) | {"x\ny\u2028z": torch.ones(1)}, first)
    line = refused("build", checkpoint, tmp_path / "e")
    assert rf"error: {checkpoint}: x\ny\u2028z: unexpected tensor" in line
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b\nc"}}))
    line = refused("build", checkpoint, tmp_path / "e")
    assert "not a safetensors index" in line and r"'b\\nc', a file name that cannot be printed" in line


def test_inspect_tells_of_any_path_in_one_line(refused, tmp_path):
    line = refused("inspect", tmp_path / "a\n\x1bb")
    assert line.startswith(rf"error: {tmp_path}/a\n\x1bb/manifest.json: no such file; expected an engine directory; build")


@pytest.mark.parametrize("command", ["build", "manifest", "quantize"])
def test_places_that_cannot_be_written_are_told_before_anything_long(command, refused, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("builder.build.compile_programs", None)
    monkeypatch.setattr("builder.quantize.quantize_layer", None)
    file = tmp_path / "file"
    file.touch()
    assert f"error: {file}: is a file, expected a directory or a new name; choose another" == refused(command, checkpoint, file)
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert f"error: {loop}: is a link to itself, expected a directory" in refused(command, checkpoint, loop)
    assert f"{file / 'e'}: cannot be written ([Errno" in refused(command, checkpoint, file / "e")
    assert "/proc/nowhere/e: cannot be written ([Errno" in refused(command, checkpoint, "/proc/nowhere/e")


@pytest.mark.parametrize("command", ["build", "manifest"])
def test_a_full_disk_is_one_line_and_leaves_nothing(command, quick, refused, checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("contract.manifest.Manifest.write", full)
    line = refused(command, checkpoint, tmp_path / "engines" / "e")
    assert "e: cannot be written ([Errno 28] No space left on device); make room" in line
    assert list((tmp_path / "engines").iterdir()) == []


def test_a_disk_that_is_full_for_a_package_is_an_error_in_python(tmp_path, monkeypatch):
    monkeypatch.setattr(inductor, "with_compiled_operators", lambda program: None)
    monkeypatch.setattr(
        "torch._inductor.aoti_compile_and_package", lambda exported, *, package_path, **_: package_path.write(b"package")
    )
    (tmp_path / "head.pt2").symlink_to("/dev/full")
    with pytest.raises(BuildError, match=r"head\.pt2: cannot be written \(.*No space left on device\); make room"):
        inductor.compile_program(SimpleNamespace(name="head", device="cpu"), tmp_path)


def test_no_compiler_is_told_before_tracing(refused, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("builder.build.compile_programs", None)
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/g++")}):
        line = refused("build", checkpoint, tmp_path / "e")
    assert line.startswith("error: C++ compiler: /nonexistent/g++ does not run, expected GCC 12 or newer; install it")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "a closed terminal"])
def test_a_signal_ends_a_build_like_an_error(number, quick, checkpoint, tmp_path, monkeypatch):
    staged = []

    def terminated(model, build, directory, report):
        staged.append(directory)
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr("builder.build.compile_programs", terminated)
    monkeypatch.setattr(sys, "argv", ["builder", "build", str(checkpoint), str(tmp_path / "engines" / "e")])
    # Whatever these tests were started under: nohup ignores the second.
    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended.value.code == 128 + number
    assert len(staged) == 1 and list((tmp_path / "engines").iterdir()) == []


def test_under_nohup_a_build_goes_on_when_the_terminal_is_closed(quick, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["builder", "build", str(checkpoint), str(tmp_path / "e")])
    before = {signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended.value.code == 0


def test_a_timing_cache_is_refused_where_nothing_reads_it(quick, checkpoint, tmp_path):
    with pytest.raises(BuildError, match=r"timing_cache: got .*timings, expected none: the target is inductor"):
        build_engine(checkpoint, tmp_path / "e", target="inductor", timing_cache=tmp_path / "timings")


def test_an_encode_pass_takes_a_canvas(refused, checkpoint, tmp_path):
    for command in ("build", "manifest"):
        line = refused(command, checkpoint, tmp_path / "e", "--max-encode-tokens", 1)
        assert line.startswith("error: max_encode_tokens: got 1, expected at least one canvas")


def test_what_the_terminals_encoding_lacks_is_a_question_mark(quick, checkpoint, tmp_path, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="latin-1", write_through=True))
    monkeypatch.setattr(sys, "argv", ["builder", "build", str(checkpoint), str(tmp_path / "e")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert b"dtype float32 (the checkpoint?s)" in printed.getvalue()


def test_names_with_brackets_are_printed_as_they_are(quick, checkpoint, tmp_path):
    for name in ("[b]e", "[/b]e"):
        build = CliRunner().invoke(app, ["build", str(checkpoint), str(tmp_path / name)], env={"COLUMNS": "300"})
        shown = CliRunner().invoke(app, ["inspect", str(tmp_path / name)], env={"COLUMNS": "300"})
        assert build.exit_code == shown.exit_code == 0, (build.exception, shown.exception)
        assert f"engine {tmp_path / name} written" in build.stdout and str(tmp_path / name) in shown.stdout


def test_a_file_that_may_not_be_read_is_not_called_missing(checkpoint, monkeypatch):
    """safetensors says the same of both."""

    def refused(path, framework):
        raise FileNotFoundError(path)

    monkeypatch.setattr("contract.checkpoint.safe_open", refused)
    shards(checkpoint)[0].unlink()
    with pytest.raises(CheckpointError) as raised:
        Checkpoint(checkpoint)
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("download the checkpoint again")
    assert all(line.endswith("cannot be read; give access to it") for line in lines[1:]) and len(lines) > 1


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({"max_sequences": 1}, ["encode", "denoise"]),
        ({"max_head_rows": 1}, ["head"]),
        ({"max_head_rows": 4}, ["head"]),
        ({"page_size": 2**26}, ["encode", "denoise"]),
    ],
    ids=str,
)
def test_programs_are_traced_for_the_smallest_limits(limits, names, checkpoint):
    """Those that have the size; the others are what they are without the limit. One layer of each kind."""
    model, build = read_model_config(checkpoint), BuildConfig(target="inductor", dtype="float32", **limits)
    model = model.model_copy(update={"layer_types": tuple(model.attention)})
    before = size_limits(model, BuildConfig(target="inductor", dtype="float32"))
    limited = {name for name, limit in size_limits(model, build).items() if limit != before[name]}
    having = [
        each for each in signatures(model, build) if limited & {size for binding in each.inputs for size in binding.shape}
    ]
    assert [each.name for each in having] == names
    for signature in having:
        assert export_program(signature, model, build).outputs


def test_the_real_target_is_refused_by_name_where_it_cannot_be_built(checkpoint, tmp_path):
    with pytest.raises(BuildError, match="target 'tensorrt'"):
        build_engine(checkpoint, tmp_path / "e", target="tensorrt")
    assert not (tmp_path / "e").exists()


def test_command_line_errors_are_one_line_each(checkpoint, tmp_path):
    shards(checkpoint)[0].unlink()
    result = CliRunner().invoke(app, ["build", str(checkpoint), str(tmp_path / "e")])
    assert result.exit_code == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "missing" in line
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "expected an engine directory" in result.stderr


def test_inspect_shows_every_binding(engine_dir):
    result = CliRunner().invoke(app, ["inspect", str(engine_dir)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name in ("token_ids", "soft_embeds", "kv_pages.3", "full_attention.page_table", "hidden"):
        assert name in result.stdout


# -- Manifest


def test_manifests_that_cannot_be_used(tmp_path, engine_dir):
    with pytest.raises(ManifestError, match="no such file; expected an engine directory"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="not a manifest of format 3"):
        read_manifest(tmp_path)
    text = (engine_dir / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"format_version": 3', '"format_version": 1'))
    with pytest.raises(ManifestError, match="got format 1, expected 3"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    edit_json(tmp_path / "manifest.json", lambda manifest: manifest["files"].pop("operators.so"))
    with pytest.raises(ManifestError, match=r"format 3 \(file: .*no size and SHA-256 of operators\.so\); build the engine"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: m["build"].update(page_size=0), "build.page_size: Input should be greater than or equal to 1"),
        (lambda m: m["model"].update(bos_token_id=-2), "model.bos_token_id: Input should be greater than or equal to 0"),
        (lambda m: m["weights"][FINAL_NORM].update(dtype="float33"), f"weights.{FINAL_NORM}.dtype: .*none of PyTorch's dtypes"),
        (lambda m: m["weights"].pop(FINAL_NORM), f"file: .*nothing about the weight {FINAL_NORM}, which a program reads"),
    ],
    ids=["a page of no tokens", "a negative token id", "an unknown dtype", "a weight less"],
)
def test_a_manifest_that_says_what_cannot_be(change, where, engine_dir, tmp_path):
    (tmp_path / "manifest.json").write_text((engine_dir / "manifest.json").read_text())
    edit_json(tmp_path / "manifest.json", change)
    with pytest.raises(ManifestError, match=rf"format 3 \({where}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(plugin_abi=0), "e: got plugin ABI 0, which is another version's"),
        (lambda m: m["tools"].update(torch="2.0.1+cpu"), "e: built with PyTorch 2.0.1, here is [0-9.]+; programs run"),
        (lambda m: m["tools"].update(torch=f"{torch.__version__.partition('+')[0]}+cu130"), "the programs are read"),
    ],
    ids=["other operators", "another PyTorch", "the same for another device"],
)
def test_an_engine_of_other_versions_is_not_loaded(change, message, quick, checkpoint, tmp_path, monkeypatch):
    def read(path):
        raise ManifestError("the programs are read")

    monkeypatch.setattr("backend.session._load_operators", read)
    build_engine(checkpoint, tmp_path / "e")
    edit_json(tmp_path / "e" / "manifest.json", change)
    with pytest.raises(ManifestError, match=message):
        Session.load(tmp_path / "e")


def test_a_manifest_that_cannot_be_read(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ManifestError, match=r"manifest\.json: cannot be read \(.*Is a directory.*\); build the engine with"):
        read_manifest(tmp_path)


def test_an_engine_that_cannot_be_replaced_is_put_back(quick, checkpoint, tmp_path, monkeypatch):
    """Where the system cannot exchange two directories."""
    monkeypatch.setattr("builder.staging._exchanged", lambda left, right: False)
    engine = tmp_path / "engines" / "e"
    manifest = build_engine(checkpoint, engine)
    replace = os.replace

    def failing(source, target):
        if Path(target) == engine and Path(source).name != "engine":
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(BuildError, match=r"cannot be written .*resource busy"):
        build_engine(checkpoint, engine, page_size=16)
    assert read_manifest(engine) == manifest
    assert [path.name for path in engine.parent.iterdir()] == ["e"]


def test_programs_hold_no_weights(engine_dir):
    """Looked for are the first numbers of every matrix; what programs do hold, frequencies of the positions, is found so."""
    manifest, tensors = read_manifest(engine_dir), Checkpoint(TINY)
    assert manifest.build.dtype == "float32" and {tensors.dtype(name) for name in tensors.names()} == {"float32"}
    rows = {name: tensors.tensor(name).flatten()[:16] for name in tensors.names() if len(tensors.shape(name)) > 1}
    assert rows.keys() >= {EMBEDDING, VISION_PROJECTION} and all(len(row.unique()) > 8 for row in rows.values())
    held = {f"{each}_frequencies": rope_frequencies(attention) for each, attention in manifest.model.attention.items()}
    for name, program in manifest.programs.items():
        with zipfile.ZipFile(engine_dir / program.file) as package:
            content = b"".join(package.read(each) for each in package.namelist())
        found = {each for each, numbers in (rows | held).items() if numbers.numpy().tobytes() in content}
        assert found == (held.keys() if name in ("encode", "denoise") else set()), name


def test_layers_that_read_the_same_rows_are_bound_as_one_weight():
    shapes = text_weights(read_model_config(REAL))
    bound, shape = bindings(shapes), binding_shapes(shapes)
    assert sorted(name for names in bound.values() for name in names) == sorted(shapes)
    sliding, full = (f"model.decoder.layers.{layer}.self_attn" for layer in (0, 5))
    assert bound[f"{sliding}.qkv_proj.weight"] == tuple(f"{sliding}.{each}_proj.weight" for each in "qkv")
    assert bound[f"{full}.qkv_proj.weight"] == tuple(f"{full}.{each}_proj.weight" for each in "qk")
    assert shape[f"{sliding}.qkv_proj.weight"] == (16 * 256 + 2 * 8 * 256, 2816)
    assert shape["model.decoder.layers.0.mlp.gate_up_proj.weight"] == (2 * 2112, 2816)
    assert bound["model.decoder.self_conditioning.gate_up_proj.weight"][0].endswith("gate_proj.weight")

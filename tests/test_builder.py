"""The builder's reading, checking and writing; every message has a case here."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from small_checkpoints import LEAST_VISION, TINY, random_checkpoint
from typer.testing import CliRunner

from builder.__main__ import app
from builder.build import build_engine
from builder.config import read_model_config
from builder.errors import BuildError
from builder.targets.compiled import Compiled
from builder.weights import VISION_PREFIXES, VISION_PROJECTION, all_weights, binding_shapes, bindings, text_weights
from contract.checkpoint import Checkpoint, CheckpointError
from contract.manifest import ManifestError, read_manifest

REAL = Path(__file__).parent.parent / "checkpoints" / "diffusiongemma-26B-A4B"


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


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "got a JSON list, expected an object")])
def test_config_that_is_no_json_object(text, message, checkpoint):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(BuildError, match=message):
        read_model_config(checkpoint)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(BuildError, match="no such file; expected the directory of a Hugging Face checkpoint"):
        read_model_config(tmp_path)


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


def test_damaged_index(checkpoint):
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        Checkpoint(checkpoint)


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
def quick(monkeypatch):
    """Replaces compilation by writing a name: what is tested here is what happens around it."""

    def compile_program(program, directory):
        (directory / f"{program.name}.pt2").write_text(program.name)
        return Compiled(file=f"{program.name}.pt2")

    monkeypatch.setattr("builder.build.compiler", lambda build, model: compile_program)
    monkeypatch.setattr(
        "builder.build.export_program",
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
    missing = r"vision_tower\.patch_embedder\.input_proj\.weight: missing, expected shape \[16, 768\]"
    with pytest.raises(CheckpointError, match=missing):
        build_engine(checkpoint, tmp_path / "c")


def test_a_build_that_fails_leaves_the_old_engine(quick, checkpoint, tmp_path, monkeypatch):
    engine = tmp_path / "engines" / "e"
    build_engine(checkpoint, engine)
    before = {path.name: path.read_bytes() for path in engine.iterdir()}

    def broken(program, directory):
        raise BuildError("no compiler")

    monkeypatch.setattr("builder.build.compiler", lambda build, model: broken)
    with pytest.raises(BuildError, match="no compiler"):
        build_engine(checkpoint, engine, force=True)
    assert {path.name: path.read_bytes() for path in engine.iterdir()} == before
    assert [path.name for path in engine.parent.iterdir()] == ["e"]


def test_a_directory_that_is_no_engine_is_not_replaced(quick, checkpoint, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(BuildError, match="holds files but no manifest"):
        build_engine(checkpoint, tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").exists()


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
    with pytest.raises(ManifestError, match="not a manifest of format 2"):
        read_manifest(tmp_path)
    text = (engine_dir / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(ManifestError, match="got format 1, expected 2"):
        read_manifest(tmp_path)


def test_the_tiny_engine_is_small(engine_dir):
    """Programs hold no weights: less than the weights although three programs share them."""
    assert read_manifest(engine_dir).checkpoint.files.keys() == {"model.safetensors"}
    assert (TINY / "model.safetensors").stat().st_size > (engine_dir / "head.pt2").stat().st_size


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

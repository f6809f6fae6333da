"""The builder's reading, checking and writing; every message has a case here."""

import json
import shutil
from pathlib import Path

import pytest
from small_checkpoints import TINY, random_checkpoint
from typer.testing import CliRunner

from builder.__main__ import app
from builder.build import build_engine
from builder.config import read_model_config
from builder.errors import BuildError
from builder.targets.compiled import Compiled
from builder.weights import VISION_PREFIXES, text_weights
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


def test_real_tensor_names_and_shapes():
    """What the builder expects is what the checkpoint has, the vision tensors apart."""
    tensors = {name: tuple(shape) for name, shape in json.loads((REAL / "tensors.json").read_text()).items()}
    text = {name: shape for name, shape in tensors.items() if not name.startswith(VISION_PREFIXES)}
    assert text_weights(read_model_config(REAL)) == text


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
        "tokenizer.json",
    }
    before = (engine / "manifest.json").stat().st_mtime_ns
    build_engine(checkpoint, engine, report=lines.append)
    assert "up to date" in lines[-1]
    assert (engine / "manifest.json").stat().st_mtime_ns == before
    build_engine(checkpoint, engine, page_size=16, report=lines.append)
    assert read_manifest(engine).build.page_size == 16
    assert [path.name for path in engine.parent.iterdir()] == ["e"]


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
    with pytest.raises(ManifestError, match="not a manifest of format 1"):
        read_manifest(tmp_path)
    text = (engine_dir / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ManifestError, match="got format 2, expected 1"):
        read_manifest(tmp_path)


def test_the_tiny_engine_is_small(engine_dir):
    """Programs hold no weights: less than the weights although three programs share them."""
    assert read_manifest(engine_dir).checkpoint.files.keys() == {"model.safetensors"}
    assert (TINY / "model.safetensors").stat().st_size > (engine_dir / "head.pt2").stat().st_size

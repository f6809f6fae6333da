"""A FIFO or a device in the place of a file is refused, in one line, where it would be waited for or read without end."""

import os
import re
import shutil
from pathlib import Path

import pytest
from damaged_engines import damaged_engine
from small_checkpoints import TINY

from backend.chat.template import ChatTemplate
from backend.engine import Engine, EngineLimits
from builder.carried_files import carried_files
from builder.config import read_model_config
from builder.errors import BuildError
from builder.existing import existing_engine
from contract.checkpoint import Checkpoint, CheckpointError
from contract.manifest import ManifestError, read_manifest
from contract.regular_file import regular
from contract.stored_file import StoredFile

IS_NONE = r"is a FIFO, expected a file"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return shutil.copytree(TINY, tmp_path / "checkpoint")


def fifo(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def test_files_directories_and_what_is_not_there_are_left_to_who_opens_them(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    for name in (".", "file", "link", "none", "x" * 300):
        assert regular(tmp_path / name) == tmp_path / name
    with pytest.raises(OSError, match=r"is a device, expected a file: '/dev/zero'"):
        regular(Path("/dev/zero"))
    (tmp_path / "to a device").symlink_to("/dev/zero")
    with pytest.raises(OSError, match=r"is a device, expected a file: '.*/to a device'"):
        regular(tmp_path / "to a device")


@pytest.mark.parametrize(
    ("name", "read", "error", "line"),
    [
        ("config.json", read_model_config, BuildError, rf"config\.json cannot be read \({IS_NONE}\); expected the directory"),
        ("tokenizer.json", carried_files, BuildError, rf"cannot be read \(.*{IS_NONE}.*\); give access to it, or replace it"),
        (
            "model.safetensors",
            Checkpoint,
            CheckpointError,
            rf"truncated or damaged \(.*{IS_NONE}.*\); download this file again",
        ),
    ],
)
def test_of_a_checkpoint(name, read, error, line, checkpoint):
    path = fifo(checkpoint / name)
    with pytest.raises(error, match=line) as refused:
        read(checkpoint)
    assert str(refused.value).startswith(str(path if name != "config.json" else checkpoint))


def test_an_index(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    fifo(checkpoint / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=rf"not a safetensors index \(.*{IS_NONE}"):
        Checkpoint(checkpoint)


def test_a_manifest_and_what_it_knows_of(tmp_path):
    path = fifo(tmp_path / "manifest.json")
    with pytest.raises(ManifestError, match=rf"manifest\.json: cannot be read \(.*{IS_NONE}"):
        read_manifest(tmp_path)
    assert existing_engine(tmp_path) is None
    assert re.search(IS_NONE, StoredFile(size_bytes=0, sha256="").fault(path))


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_of_an_engine(name, engine_dir, tmp_path):
    engine = damaged_engine(engine_dir, tmp_path / "engine", name, keep=1)
    fifo(engine / name)
    with pytest.raises(ManifestError, match=rf"{re.escape(name)}: cannot be .*{IS_NONE}"):
        Engine.load(engine, EngineLimits())


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_of_a_chat(name, tmp_path, chat_tokenizer):
    fifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: cannot be read \(.*{IS_NONE}"):
        ChatTemplate.load(tmp_path, chat_tokenizer.backend_tokenizer)

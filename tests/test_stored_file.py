"""Damaged files of an engine are told before one is loaded: a library or program that is cut short ends the process."""

import re
import shutil

import pytest

from backend import session
from backend.session import Session
from contract.manifest import ManifestError
from contract.stored_file import StoredFile


def test_a_record_by_hand(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    stored = StoredFile.of(tmp_path / "a")
    assert stored.size_bytes == 3
    assert stored.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert stored.fault(tmp_path / "a") is None
    (tmp_path / "a").write_bytes(b"abd")
    assert re.fullmatch(r"got the SHA-256 [0-9a-f]{12}…, expected ba7816bf8f01…", stored.fault(tmp_path / "a"))
    (tmp_path / "a").write_bytes(b"")
    assert stored.fault(tmp_path / "a") == "got 0 bytes, expected 3"
    (tmp_path / "a").unlink()
    assert stored.fault(tmp_path / "a") == "missing"
    (tmp_path / "a").mkdir()
    assert "cannot be read" in stored.fault(tmp_path / "a")


@pytest.mark.parametrize("file", ["operators.so", "vision.pt2"])
@pytest.mark.parametrize("what", ["cut short", "another's", "gone"])
def test_a_damaged_file_is_told_before_any_is_loaded(what, file, engine_dir, tmp_path, monkeypatch):
    engine = tmp_path / "engine"
    shutil.copytree(engine_dir, engine)
    content = bytearray((engine / file).read_bytes())
    (engine / file).unlink()
    if what == "cut short":
        (engine / file).write_bytes(content[: len(content) // 3])
        fault = f"got {len(content) // 3} bytes, expected {len(content)}"
    elif what == "another's":
        content[len(content) // 2] ^= 1
        (engine / file).write_bytes(content)
        fault = "got the SHA-256 "
    else:
        fault = "missing"
    monkeypatch.setattr(session, "load_operators", None)
    monkeypatch.setattr(session, "load_program", None)
    with pytest.raises(ManifestError) as refused:
        Session.load(engine)
    assert str(refused.value).startswith(f"{engine / file}: {fault}")
    assert str(refused.value).endswith("; build the engine again with --force")

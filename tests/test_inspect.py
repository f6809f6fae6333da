"""What `python -m builder inspect` says of an engine; its bindings are in `test_builder.py`."""

import re

from sparse_checkpoint import SHAPE_26B
from typer.testing import CliRunner

from builder.__main__ import app
from builder.build import write_manifest


def test_facts_are_for_people(tmp_path):
    write_manifest(SHAPE_26B, tmp_path / "26b", report=lambda line: None, max_sequences=8)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "26b")], env={"COLUMNS": "250"}).stdout
    facts = dict(re.findall(r"│ (\S.*?) +│ (\S.*?) +│", shown))
    assert facts["layers"] == "30: 25 sliding_attention, 5 full_attention"
    assert facts["checkpoint"].endswith("(no weights: made from config.json alone)")
    assert facts["built for"].startswith("page_size 32, max_encode_tokens 2048, max_sequences 8, ")
    assert not re.search(r"[\"'{}:]|\(\)", facts["built for"])

"""`benchmarks/server_load.py` at a size for every day: it checks what it does, and fails if that is not so."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_server_under_load_answers_everybody_and_leaves_nothing(engine_dir):
    script = ROOT / "benchmarks" / "server_load.py"
    command = [sys.executable, script, "--engine", engine_dir, "--requests", "200", "--clients", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, result["problems"]) == (0, [])
    assert sum(result["ended"].values()) == 200

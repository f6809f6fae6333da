"""Whether an engine's worker can make the matcher of a grammar without keeping other requests waiting.

llguidance takes minutes and gigabytes for some short grammars, and crashes on others. So each is made once in a process of its
own, whose time and memory are limited, before a request that has it goes to the worker. What passed is remembered.
"""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from backend.errors import RequestError
from backend.grammar import Grammar

_SCRIPT = Path(__file__).with_name("grammar_process.py")
_COERCION = ". Enable 'coerce_one_of' option to approximate oneOf with anyOf"  # no client has such an option
_TIMEOUT_S = 20  # of a machine that is busy; the process itself limits its time on a processor


def check_grammar(grammar: Grammar | None) -> None:
    """Takes 0.1 s for a grammar that has not been seen. May be called from any thread.

    Raises RequestError: INVALID_ARGUMENT for one that llguidance refuses, or takes too long for; UNAVAILABLE if there is no
        telling."""
    if grammar and (problem := _problem(grammar)):
        raise grammar.refusal(problem)


@lru_cache(maxsize=1024)
def _problem(grammar: Grammar) -> str:
    asked = json.dumps({"grammar": grammar.text, "max_readings": grammar.max_readings})
    command = [sys.executable, "-I", str(_SCRIPT)]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:  # not remembered
        line = f"{grammar.of}: the machine is too busy to look at it; try again later"
        raise RequestError("UNAVAILABLE", line) from None
    if done.returncode < 0 or "MemoryError" in done.stderr:  # ended by a signal: its time was over, or its stack
        return "got a grammar that takes more than a second or 2 GB to make"
    if done.returncode:
        raise RuntimeError(f"{_SCRIPT}: {done.stderr.strip()}")
    return told(done.stdout)


def told(problem: str) -> str:
    """What llguidance says, in a line: its first, and of a regular expression the one that says what is wrong."""
    lines = [" ".join(line.split()) for line in problem.strip().splitlines()]
    errors = [line for line in lines[1:] if line.startswith("error:")]
    line = " ".join(line.rstrip(":") for line in lines[:1] + errors[:1])
    return line.replace(_COERCION, ", but where no two alternatives can both fit; use anyOf")[:300]

"""The benchmarks' commands at sizes for every day, what they refuse to time, and what they count."""

import argparse
import ast
import asyncio
import contextlib
import importlib
import json
import re
import runpy
import subprocess
import sys
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_checkpoints import TINY

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import command_line  # noqa: E402
from measuring import Goal, Report, Timing, in_turns  # noqa: E402
from plot import plot  # noqa: E402
from records import log_entry, prepend  # noqa: E402
from small_checkpoint import make_small_checkpoint  # noqa: E402
from step_cost import step_cost  # noqa: E402
from suite import FOLDER, Benchmark, Place, suite  # noqa: E402

from builder.config import read_model_config  # noqa: E402
from contract.checkpoint import Checkpoint  # noqa: E402

LITTLE = {"vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 1, "layer_types": ["full_attention"], "num_experts": 8}
COMMANDS = {
    "machine": ("--quick",),
    "generation": "--rounds 1 --batches 1 2 --prompts 1 --canvases 1 --steps 2".split(),
    "prefill": "--rounds 1 --lengths 8 9999".split(),
    "parameters": "--rounds 1 --batches 1 2 --steps 2".split(),
    "agreement": "--prompt-tokens 60 --steps 2".split(),
    "server": "--rounds 1 --canvases 1 --canvases-a-request 1 --steps 2 --clients 1 2".split(),
    "serving": "--clients 1 2 --requests-a-client 1 --canvases 1 --steps 2 --api openai -- --set max_sequences=2".split(),
    "loading": "--no-build --rounds 1 --sequences 1".split(),
    "fixed_steps": "--rounds 1 --at-once 1 2 --steps 2".split(),
    "step_profile": "--batch 2 --steps 2".split(),
    "memory": "--counts 1 --vocab-size 256".split(),
}
TAKES = {
    "generation": "checkpoint engine",
    "prefill": "checkpoint engine",
    "agreement": "checkpoint engine",
    "parameters": "engine",
    "server": "engine",
    "serving": "engine",
    "fixed_steps": "engine",
    "step_profile": "engine",
    "loading": "checkpoint engine",
}


@pytest.fixture
def run(monkeypatch, engine_dir, capsys):
    """Runs a benchmark's `main` in this process and returns its report."""

    def started(name: str) -> Report:
        places = {"checkpoint": TINY, "engine": engine_dir}
        arguments = [word for each in TAKES.get(name, "").split() for word in (f"--{each}", str(places[each]))]
        monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *arguments, *COMMANDS[name]])
        importlib.import_module(name).main()
        return Report.from_json(capsys.readouterr().out.splitlines()[-1])

    return started


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_module_can_be_imported(name):
    """Also those that only a GPU can run."""
    pytest.importorskip("triton", reason="kernels are written in Triton's language")
    importlib.import_module(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_with_its_report(run, name):
    report = run(name)
    assert report.rows
    assert all(row.value > 0 for row in report.rows if not row.case.endswith("added") and row.system != "unseen")


def test_an_engine_further_off_than_transformers_is_told():
    from agreement import THEIRS, Distance, _goals

    errors = torch.linspace(0.01, 0.1, 11)
    distances = {name: Distance(errors=errors * factor, same=torch.ones(11)) for name, factor in ((THEIRS, 1), ("e", 1.6))}
    assert [goal.value for goal in _goals("e", distances, "bfloat16")] == [1.6, 1.6]
    assert not any(goal.is_met for dtype in ("bfloat16", "float32") for goal in _goals("e", distances, dtype))
    assert all(goal.is_met for goal in _goals(THEIRS, distances, "bfloat16"))


REFUSALS = {
    "memory --counts 0": "argument --counts: got 0, expected 1 or more",
    "full_checkpoint {empty}": "{empty}: is there, expected a new name; choose another",
    "server --engine {tiny}": "argument --engine: got {tiny}, expected a directory with a manifest.json",
    "expert_quality --checkpoint /nowhere": "argument --checkpoint: got /nowhere, expected a directory that is there",
    "expert_quality --checkpoint {empty}": "argument --checkpoint: got {empty}, expected a directory with a config.json",
    "weight_loading --directory /nowhere": "argument --directory: got /nowhere, expected a directory that is there",
    "weight_loading --device cuda": "PyTorch finds no CUDA device here, expected one; run this on a machine with a GPU",
    "weight_loading --gigabytes 0": "argument --gigabytes: got 0, expected a number above 0",
    "weight_loading --gigabytes nan": "argument --gigabytes: got nan, expected a number above 0",
    "step": "PyTorch finds no CUDA device here, expected one; run this on a machine with a GPU",
}


@pytest.mark.parametrize("command", REFUSALS)
def test_what_cannot_be_measured_is_refused_in_one_line(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    places = {"tiny": TINY, "empty": tmp_path}
    name, *arguments = command.format(**places).split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert f"error: {REFUSALS[command].format(**places)}" in (ended.value.code, *error_lines(name, capsys.readouterr().err))
    assert ended.value.code


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_first_line_says_what_a_file_is(path):
    """In a whole sentence: `--help` prints it alone."""
    first, *others = ast.get_docstring(ast.parse(path.read_text())).split("\n")
    assert first.endswith(".") and others[:1] in ([], [""])


def error_lines(name: str, text: str) -> list[str]:
    """Of argparse, without the program's name."""
    return [line.removeprefix(f"{name}.py: ") for line in text.splitlines()]


@pytest.mark.parametrize("name", ["kernels", "extras_kernels", "fp8_kernels"])
def test_kernels_are_measured_on_a_gpu_alone(name, monkeypatch):
    pytest.importorskip("triton", reason="kernels are written in Triton's language")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match="error: PyTorch finds no CUDA device here"):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def test_a_checkpoint_of_full_size_has_random_products_and_norms_of_one(monkeypatch, tmp_path):
    """Of its tensors, a few: the files are the real one's for these."""
    module = importlib.import_module("full_checkpoint")
    few = {
        name: header for name, header in module.headers_26b().items() if re.search(r"decoder\.layers\.7\.(router|.*norm)", name)
    }
    monkeypatch.setattr(module, "headers_26b", lambda: few)
    monkeypatch.setattr(module, "sparse_checkpoint", partial(module.sparse_checkpoint, headers=few))
    num_bytes = module.make_full_checkpoint(tmp_path / "full", seed=3)
    made, again = Checkpoint(tmp_path / "full"), tmp_path / "again"
    assert num_bytes == sum(made.extent(name).num_bytes for name in few)
    for name, (_, shape) in few.items():
        numbers = made.tensor(name).float()
        assert numbers.std().item() == pytest.approx(1, rel=0.01) if len(shape) > 1 else bool((numbers == 1).all())
    module.make_full_checkpoint(again, seed=3)
    assert all(torch.equal(made.tensor(name), Checkpoint(again).tensor(name)) for name in few)
    assert read_model_config(again).vocab_size == module.VOCAB_SIZE


@pytest.mark.parametrize("num_requests", [1, 5])
def test_a_load_of_few_requests_may_lack_a_kind(num_requests, monkeypatch):
    """With this seed the first is cancelled, and no one of five is malformed."""
    module = importlib.import_module("server_load")
    endings = {"whole": "stop", "streamed": "length", "cancelled": "cancelled", "malformed": "error"}

    async def ask(client, kind: str, *_) -> str:
        return endings[kind]

    monkeypatch.setattr(module, "ask", ask)
    monkeypatch.setattr(module, "memory_of", lambda server: {"worker": 1})
    options = SimpleNamespace(seed=0, requests=num_requests, clients=2, max_tokens=1)
    result = asyncio.run(module.load(SimpleNamespace(grpc_url="localhost:1"), options))
    assert (result["whole_answer_median_s"] is None) == (num_requests == 1)
    assert "malformed: error" not in result["ended"]
    answers = sum(count for ending, count in result["ended"].items() if ending.startswith(("whole", "streamed")))
    nothing = dict.fromkeys(("active_requests", "queued_requests", "kv_pages_used", "processes_after_unload", "left"), 0)
    result |= {"counted": {"success": answers, "rejected": 0, "failed": 0}, "shm_is_as_before": True, **nothing}
    assert module.found_problems(result, num_requests) == []
    result["counted"]["rejected"] = 1
    assert module.found_problems(result, num_requests) == [f"the server counted {result['counted']}"]


def test_generation_is_timed_against_both_caches_and_the_floor(run):
    report = run("generation")
    systems = ["transformers, dynamic cache", "transformers, static cache", "this engine"]
    of_case = {case: [row.system for row in report.rows if row.case == case] for case in {row.case for row in report.rows}}
    assert of_case == {f"batch {size}, 2 steps": [*systems, *systems, "floor of this machine"] for size in (1, 2)} | {
        f"batch {size}, adaptive": [*systems, *systems] for size in (1, 2)
    }


def test_prompts_that_the_model_cannot_take_are_named(run):
    assert "9999 tokens: left out, the model has 4096 positions" in run("prefill").notes


@pytest.mark.parametrize(
    ("name", "broken", "reason"),
    [
        ("generation", "ours", "1 sequences of this engine differ from transformers' with the same noise"),
        ("prefill", "encode", "8 tokens: keys of the last layer differ"),
        ("parameters", "count_dependent", "2 of 6 requests get other tokens together than alone"),
        ("server", "online", "1 clients: tokens over gRPC differ"),
        ("loading", "bind_weights", "weights as they are bound differ from the checkpoint's"),
    ],
)
def test_what_differs_is_not_timed(run, monkeypatch, name, broken, reason):
    module = importlib.import_module(name)
    right = getattr(module, broken)

    def wrong(*arguments):
        result = right(*arguments)
        if isinstance(result, dict):
            return {each: tensor + 1 for each, tensor in result.items()}
        if isinstance(result, torch.Tensor):
            return result + 1
        if isinstance(result, int):
            return result + 2
        return [[token + 1 for token in tokens] for tokens in result]

    class NoServer(contextlib.nullcontext):
        grpc_url = ""

    if name == "server":
        monkeypatch.setattr(module, "TritonServer", lambda **_: NoServer(NoServer()))
        right = lambda url, *more: [[0]]  # noqa: E731
    monkeypatch.setattr(module, broken, wrong)
    with pytest.raises(SystemExit, match=reason):
        run(name)


def test_other_engines_are_refused_by_name(run, monkeypatch, engine_dir):
    module = importlib.import_module("generation")
    read = module.read_manifest

    def bfloat16(directory):
        manifest = read(directory)
        return manifest.model_copy(update={"build": manifest.build.model_copy(update={"dtype": "bfloat16"})})

    monkeypatch.setattr(module, "read_manifest", bfloat16)
    with pytest.raises(SystemExit, match="is for bfloat16 on cpu, and only float32 on the CPU gives the same tokens"):
        run("generation")


def test_the_small_checkpoint_is_made_from_its_seed(tmp_path):
    seeds = {"first": 3, "again": 3, "other": 4}
    first, again, other = (
        make_small_checkpoint(tmp_path / name, seed=seed, canvas_length=8, **LITTLE) for name, seed in seeds.items()
    )
    contents = [(each / "model.safetensors").read_bytes() for each in (first, again, other)]
    assert contents[0] == contents[1] != contents[2]
    tokenizer = json.loads((first / "tokenizer.json").read_text())
    assert sorted(tokenizer["model"]["vocab"].values()) == list(range(500))
    assert read_model_config(first).vocab_size == 500
    assert Checkpoint(first).dtype("model.decoder.embed_tokens.weight") == "float32"


@pytest.mark.parametrize("content", ["thesis.txt", "src/main.py"])
def test_the_small_checkpoint_takes_no_other_directorys_place(content, tmp_path, monkeypatch):
    file = tmp_path / "mine" / content
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    monkeypatch.chdir(tmp_path / "mine")
    for directory in (Path("."), tmp_path / "mine", file):
        with pytest.raises(ValueError, match=r"there is something else, expected a new name or such a checkpoint"):
            make_small_checkpoint(directory, canvas_length=8, **LITTLE)
    assert file.read_text() == "years of work"
    for _ in range(2):
        make_small_checkpoint(tmp_path / "new", canvas_length=8, **LITTLE)


def test_engines_without_programs_are_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(argparse.ArgumentTypeError, match="which has no programs, expected an engine"):
        command_line.engine(str(tmp_path))


def test_a_steps_cost_equals_a_count_by_hand(tmp_path):
    """One full layer, 2 canvases of 8: 16 rows of 32. 4 heads of 32, 1 key head, so 128 query and 32 key columns."""
    text = {**LITTLE, "top_k_experts": 2, "intermediate_size": 64, "moe_intermediate_size": 24}
    model = read_model_config(make_small_checkpoint(tmp_path / "checkpoint", canvas_length=8, **text, **HEADS))
    cost = step_cost(model, batch=2, prefix=10)
    assert cost.operations == {
        "attention": 4 * 16 * 128 * (10 + 8),
        "dense": 2 * 16 * 32 * (128 + 128 + 32 + 3 * 64 + 8) + 2 * 16 * 3 * 32 * 64,
        "experts": 2 * 16 * 2 * 3 * 32 * 24,
        "vocabulary": 2 * 2 * 16 * 32 * 500,
    }
    matrices = 2 * 128 * 32 + 32 * 32 + 3 * 64 * 32 + 8 * 32 + 8 * 3 * 24 * 32 + 3 * 64 * 32 + 2 * 500 * 32
    vectors = 7 * 32 + 2 * 32 + 32 + 8 + 2 + 2 * 32  # norms, query and key norms, router, scalars, final and self-conditioning
    assert cost.read_bytes == 4 * (matrices + vectors + 2 * 10 * 2 * 32)
    assert cost.floor_s(bandwidth=1e9, rate=1e30) == cost.read_bytes / 1e9
    assert cost.floor_s(bandwidth=1e30, rate=1e9) == sum(cost.operations.values()) / 1e9


HEADS = {"num_attention_heads": 4, "num_global_key_value_heads": 1, "global_head_dim": 32}


def test_systems_are_timed_in_turns():
    order = []
    timings = in_turns({"one": lambda: order.append(1), "other": lambda: order.append(2)}, 3)
    assert order == [1, 2] * 3
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]
    assert (Timing(seconds=[1.0, 2.0, 4.0]).median_s, Timing(seconds=[1.0, 2.0, 4.0]).spread) == (2.0, 1.5)


def report_of_two() -> Report:
    report = Report(benchmark="speed", notes=["a note"])
    report.add("one case", "theirs", 100.0, "tokens/s")
    report.add("one case", "ours", 250.0, "tokens/s", Timing(seconds=[1.0, 1.1, 1.0]))
    report.goals += [Goal(what=each, value=value, limit=2.0, unit="ms") for each, value in (("kept", 2.0), ("broken", 3.0))]
    return report


def test_an_entry_of_the_log_has_every_figure_goal_and_failure(tmp_path):
    log = tmp_path / "LOG.md"
    log.write_text("# Results\n\n## 2026-01-01, before\n\ntext\n")
    prepend(log, log_entry(date(2026, 2, 3), {"cpu": "a CPU", "cores": 2}, [report_of_two()], {"memory": "it fell over"}))
    lines = log.read_text().splitlines()
    assert lines[2] == "## 2026-02-03, `make bench` on 2 CPU cores"
    for line in (
        "cpu a CPU, cores 2.",
        "| one case | theirs | 100 tokens/s |  |  |",
        "| one case | ours | 250 tokens/s | 10% | 2.50x |",
        "- goal met: kept: 2 ms, at most 2",
        "- goal MISSED: broken: 3 ms, at most 2",
        "- a note",
        "Failed: memory: it fell over",
    ):
        assert line in lines
    assert lines[-4:] == ["", "## 2026-01-01, before", "", "text"]


def test_a_plot_is_written(tmp_path):
    plot([report_of_two()], "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    broken = Benchmark(name="broken", script="machine.py", options=("--rounds", "many"), quick=())
    listed = [broken, Benchmark(name="machine", script="machine.py", options=(), quick=("--quick",))]
    module = importlib.import_module("run")
    monkeypatch.setattr(module, "suite", lambda *_: listed)
    places = [f"--{name}={tmp_path / name}" for name in ("checkpoint", "engine", "results")]
    monkeypatch.setattr(sys, "argv", ["run.py", *places, "--quick"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    [directory] = (tmp_path / "results").iterdir()
    outcomes = json.loads((directory / "results.json").read_text())["benchmarks"]
    failure = "machine.py: error: argument --rounds: invalid count value: 'many'"
    assert ended.value.code
    assert [(each["name"], each["failure"]) for each in outcomes] == [("broken", failure), ("machine", None)]
    assert outcomes[1]["report"]["rows"]
    assert {path.name for path in directory.iterdir()} == {"results.json", "plot.png", "broken.log", "machine.log"}
    assert f"FAILED broken: {failure}" in capsys.readouterr().out


def test_names_that_are_no_benchmark_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--checkpoint", "x", "--engine", "y", "--only", "speed"])
    with pytest.raises(
        SystemExit, match="--only: got speed, expected of machine, generation-tiny, prefill-tiny, parameters-tiny, server"
    ):
        importlib.import_module("run").main()


def test_what_is_there_is_not_made_again(tmp_path):
    module = importlib.import_module("run")
    tiny, small = (Place(checkpoint=tmp_path / name, engine=tmp_path / f"{name}_engine") for name in ("tiny", "small"))
    assert module.preparation("small checkpoint", tiny, small)[1:] == [str(small.checkpoint)]
    assert module.preparation("tiny", tiny, small)[:3] == ["-m", "builder", "build"]
    small.checkpoint.mkdir()
    tiny.engine.mkdir()
    (tiny.engine / "manifest.json").touch()
    assert module.preparation("small checkpoint", tiny, small) == module.preparation("tiny", tiny, small) == []


def test_the_suite_names_scripts_that_are_there():
    places = [Place(checkpoint=Path(name), engine=Path(f"engine of {name}")) for name in ("tiny", "small")]
    listed = suite(*places)
    assert len({each.name for each in listed}) == len(listed)
    for each in listed:
        assert Path(each.command(quick=False)[0]).exists()
    assert not any("small" in word for each in listed if each.quick is not None for word in each.command(quick=True))


RESIDENT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import torch
from resident_memory import PeakWatcher, descendants, peak_bytes, resident
from contract.checkpoint import Checkpoint
from pathlib import Path

before, tensors = resident(), Checkpoint(Path({checkpoint!r}))
touched = sum(float(tensors.tensor(name).sum()) for name in tensors.names())
allocated = torch.ones(16 << 20)
with PeakWatcher(1, interval_s=60) as watcher:
    pass
after = resident()
assert touched == touched
assert after.weights - before.weights > 3_000_000, (before, after)
assert after.anonymous - before.anonymous > 0.9 * allocated.nbytes, (before, after)
assert peak_bytes() >= 0.9 * after.total
assert descendants(1)[0] == 1
assert watcher.together.total >= 0
"""


def test_resident_memory_tells_weights_from_what_was_allocated():
    """In a process of its own: in one with a history, what is given back meanwhile hides what is allocated."""
    program = RESIDENT.format(root=str(ROOT), checkpoint=str(TINY))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

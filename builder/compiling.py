"""The programs of an engine, traced and compiled: for TensorRT one after the other; with AOTInductor in processes of their own,
for a GPU all at once.

A signal that ends a build is an exception in this process. Inside of PyTorch, where C++ and Python call each other, one may
end the process without a clean-up, or come out as an error of the program that is compiled.

What the processes leave in the compiler's cache goes with the build. The cache that PyTorch has for all is written in place,
under names that follow from the programs: of two builds of the same programs at once, each would take files that the other is
writing.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from builder.export import TracedProgram, export_program, minimums, signatures
from builder.onnx_export import traced_for_onnx
from builder.processes import processes
from builder.targets import Compile, compiler
from contract.manifest import BuildConfig, Program, Variant
from contract.model_config import ModelConfig
from contract.own_directory import own_directory


def compile_programs(
    model: ModelConfig, build: BuildConfig, directory: Path, report: Callable[[str], None]
) -> dict[str, Program]:
    """Every program of the `inductor` target with its variants, written into `directory`.

    A script that calls this needs `if __name__ == "__main__"` around it, as all that starts Python processes does.

    Raises:
        BuildError: a program cannot be compiled or written, or a process was ended from outside.
    """
    wanted = {each.name: minimums(each, build) for each in signatures(model, build)}
    report("compiling " + ", ".join(f"{name} ({len(least)} times)" for name, least in wanted.items()))
    done: dict[tuple[str, int], Program] = {}
    # What is being written when the build is stopped may be there a little longer.
    with own_directory("diffusiongemma_compile_") as caches:
        tasks = [(name, minimum) for name, least in wanted.items() for minimum in least]
        at_once = min(len(tasks), len(os.sched_getaffinity(0))) if build.device == "cuda" else 1
        with processes(at_once) as pool:
            running = {pool.submit(_compile_alone, caches, model, build, *task, directory): task for task in tasks}
            for future in as_completed(running):
                done[running[future]] = future.result()
                report(f"compiled {future.result().file}")
    return {
        name: done[name, 1].model_copy(
            update={"variants": tuple(Variant(minimum=each, file=done[name, each].file) for each in least[1:])}
        )
        for name, least in wanted.items()
    }


def compile_plans(
    model: ModelConfig,
    build: BuildConfig,
    directory: Path,
    report: Callable[[str], None],
    *,
    timing_cache: Path,
    console: Console | None,
) -> dict[str, Program]:
    """Every program of the `tensorrt` target, written into `directory`, one after the other: each takes the whole GPU, to time
    it. `timing_cache`, `console`: see `builder.targets.tensorrt`."""
    compile_program = compiler(build, model, timing_cache=timing_cache, console=console)
    programs = {}
    for signature in signatures(model, build):
        report(f"tracing {signature.name}")
        program = traced_for_onnx(signature, model, build)
        report(f"compiling {program.name}")
        programs[program.name] = _compiled(program, compile_program, directory)
    return programs


def _compiled(program: TracedProgram, compile_program: Compile, directory: Path) -> Program:
    compiled = compile_program(program, directory)
    return Program(
        file=compiled.file,
        inputs=program.inputs,
        weights=program.weights,
        outputs=program.outputs,
        profiles=compiled.profiles,
    )


def _compile(model: ModelConfig, build: BuildConfig, name: str, minimum: int, directory: Path) -> Program:
    [signature] = [each for each in signatures(model, build) if each.name == name]
    return _compiled(export_program(signature, model, build, minimum), compiler(build, model), directory)


def _compile_alone(caches: Path, *task: Any) -> Program:
    with own_cache(caches):
        return _compile(*task)


@contextmanager
def own_cache(caches: Path) -> Iterator[None]:
    """A directory of its own, in `caches`, for what the compiler leaves."""
    from torch._inductor.utils import clear_caches  # only here: it imports the compiler

    directory = tempfile.mkdtemp(dir=caches)
    places = {"TORCHINDUCTOR_CACHE_DIR": directory, "TRITON_CACHE_DIR": str(Path(directory, "triton"))}
    before = {name: os.environ[name] for name in places if name in os.environ}
    os.environ.update(places)
    clear_caches()  # what this process remembers of the directory of before
    try:
        yield
    finally:
        for name in places:
            del os.environ[name]
        os.environ.update(before)
        clear_caches()

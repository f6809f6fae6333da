"""The `inductor` target: one AOTInductor package a program, for the CPU or for the GPU that is here."""

import io
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.export import ExportedProgram

from builder.export import TracedProgram, tracing
from builder.staging import writing
from builder.targets.compiled import Compiled
from builder.targets.cpp_compiler import compiling
from contract.manifest import BuildConfig
from plugins.cpu import COMPILED
from plugins.library import NAMESPACE

_aten = torch.ops.aten
_OPTIONS = {
    # Precompiled headers are of 283 MB and stay in a directory that all builds share, where a build that is killed leaves half
    # of one. Without them the compiler takes 2 to 3 s of CPU time more for a program, and saves the 10 s of making them.
    "aot_inductor.precompile_headers": False,
    "cpp_cache_precompile_headers": False,
    # The wrapper only calls, in order, what computes: of the tiny checkpoint's four, 67 s of CPU time become 45 s, the packages
    # are half as large, and a step takes what it took.
    "aot_inductor.compile_wrapper_opt_level": "Og",
    "aot_inductor.enable_line_tables": False,
    # Else 6 s to see whether the compiler takes the processor's own vectors, which every GCC that is expected does.
    "cpp.vec_isa_ok": True,
}
"""None of them changes a result. PyTorch 2.11, with which engines for GPUs have been built too, does not have all."""


def compile_program(program: TracedProgram, directory: Path) -> Compiled:
    """Compiles to `<name>.pt2`.

    For the CPU, plugin operators stay calls through the dispatcher, of float32 programs to their C++ forms, and all else
    becomes C++. For a GPU, their kernels are compiled into the package like all others (but see `opened`).

    Raises:
        BuildError: the program cannot be opened, the compiler fails, or the file cannot be written.
    """
    from torch._inductor import config  # only here: it imports the compiler

    name, package = f"{program.name}.pt2", io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about its pickled tree specs
        with tracing(program.name):
            exported = opened(program) if program.device == "cuda" else with_compiled_operators(program)
        with compiling(f"program {program.name}"):
            known = config.get_config_copy()
            options = {name: value for name, value in _OPTIONS.items() if name in known}
            torch._inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs=options)
    with writing(directory / name):
        (directory / name).write_bytes(package.getbuffer())  # PyTorch's own writer ends the process where the disk is full
    return Compiled(file=name)


def has_compiled_operators(build: BuildConfig) -> bool:
    """Whether programs of this build call operators in C++, which must be compiled with them."""
    return build.target == "inductor" and build.device == "cpu" and build.dtype == "float32"


def with_compiled_operators(program: TracedProgram) -> ExportedProgram:
    """A program for the CPU: calls of float32 plugin operators go to their C++ forms."""
    graph = program.exported.graph
    for node in graph.nodes:
        if node.op == "call_function" and node.target in COMPILED and node.meta["val"].dtype == torch.float32:
            node.target = COMPILED[node.target]
    program.exported.graph_module.recompile()
    return program.exported


def opened(program: TracedProgram) -> ExportedProgram:
    """The program with plugin operators replaced by their kernels' launches, which the compiler sees through.

    Of the text model attention stays a call, which finds the kernel for the device. So does the feed-forward operator, of
    denoise and of encode for very many tokens (`TracedProgram`): its launches depend on the device and on sizes that are known
    at the call alone. What that costs the host denoise, which is captured in CUDA graphs, pays once, and encode while kernels
    run.
    """
    from plugins.attention.opened import CUDA_DECOMPOSITIONS as ATTENTION  # only here: they need triton
    from plugins.feed_forward.opened import CUDA_DECOMPOSITIONS as FEED_FORWARD
    from plugins.heads.opened import CUDA_DECOMPOSITIONS as HEADS

    kernels = dict(HEADS)
    if program.name == "vision":
        kernels |= ATTENTION
    if not program.calls_feed_forward:
        kernels |= FEED_FORWARD
    exported = program.exported.run_decompositions(kernels)
    _store_shared(exported)
    return exported


def _store_shared(exported: ExportedProgram) -> None:
    """Makes the compiler store what several plugin operators read: cosines and sines of the positions, starts of the sequences.

    It takes them for cheap and computes them again for every layer: on an H200, 75 kernels and 0.13 ms of a step. A strided
    view needs memory under it, so its operand is computed once and stored.
    """
    graph = exported.graph
    ours = [node for node in graph.nodes if getattr(node.target, "namespace", None) == NAMESPACE]
    read = Counter(argument for node in ours for argument in node.all_input_nodes)
    computed = [node for node in read if getattr(node.target, "namespace", None) == "aten" and not node.target.is_view]
    for node in (each for each in computed if read[each] > 1):
        rows, *inner = node.meta["val"].shape
        with graph.inserting_after(node):
            num_rows = graph.call_function(_aten.sym_size.int, (node, 0))
        num_rows.meta["val"] = rows
        with graph.inserting_after(num_rows):
            stored = graph.call_function(_aten.as_strided.default, (node, [num_rows, *inner], list(node.meta["val"].stride())))
        stored.meta = dict(node.meta)
        node.replace_all_uses_with(stored, delete_user_cb=lambda user, own=(num_rows, stored): user not in own)
    exported.graph_module.recompile()

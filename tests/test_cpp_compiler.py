"""What a compiler that fails, or cannot be used, says to the user: one line."""

import pickle
import tempfile
from types import SimpleNamespace

import pytest
from torch._inductor.exc import CppCompileError, InductorError

from builder.errors import BuildError
from builder.targets import inductor
from builder.targets.cpp_compiler import check_directories, compiling

OUTPUTS = {
    "In file included from a.cpp:1:\na.hpp:7:2: fatal error: b.h: No such file or directory\ncompilation terminated.": (
        "a.hpp:7:2: fatal error: b.h: No such file or directory"
    ),
    "/usr/bin/ld: final link failed: No space left on device\ncollect2: error: ld returned 1 exit status": (
        "/usr/bin/ld: final link failed: No space left on device"
    ),
    "\n  Illegal instruction\nmore\n": "Illegal instruction",
    "": "without a word",
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_first_telling_line_is_shown(output):
    with pytest.raises(BuildError) as refused, compiling("program head"):
        raise InductorError(CppCompileError(["g++", "a.cpp"], output), None)
    assert str(refused.value) == (
        f"program head: cannot be compiled ({OUTPUTS[output]}); expected GCC 12 or newer (CXX names another), room for "
        f"it, and room in {tempfile.gettempdir()} (TMPDIR names another)"
    )
    assert isinstance(refused.value.__cause__, InductorError)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)  # as from a process of its own


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no\nkernel")], ids=["disk", "other"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_whatever_else_a_compiler_raises_is_one_line(error, wrapped, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise InductorError(error, None) if wrapped else error

    monkeypatch.setattr(inductor, "with_compiled_operators", lambda program: None)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", broken)
    first_line = str(error).partition("\n")[0]
    with pytest.raises(BuildError) as refused:
        inductor.compile_program(SimpleNamespace(name="head", device="cpu"), tmp_path)
    assert str(refused.value).startswith(f"program head: cannot be compiled ({type(error).__name__}: {first_line}); expected")


def test_what_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    def refuse(program):
        raise ValueError("\nheads kernel: got head_dim 96\n\nWhile executing %normed_heads\nOriginal traceback:")

    monkeypatch.setattr(inductor, "opened", refuse)
    with pytest.raises(BuildError) as refused:
        inductor.compile_program(SimpleNamespace(name="encode", device="cuda"), tmp_path)
    assert str(refused.value) == (
        "program encode: cannot be traced (ValueError: heads kernel: got head_dim 96); expected sizes that its operators take, "
        "see the checkpoint's config.json"
    )


def test_nothing_stays_in_the_directory_that_all_builds_share(tmp_path, monkeypatch):
    """Headers that are compiled before do: PyTorch takes a place for them that no build can choose."""
    asked = {}

    def compile_and_package(exported, *, package_path, inductor_configs):
        asked.update(inductor_configs)

    monkeypatch.setattr(inductor, "with_compiled_operators", lambda program: None)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile_and_package)
    inductor.compile_program(SimpleNamespace(name="head", device="cpu"), tmp_path)
    assert asked == {
        "aot_inductor.precompile_headers": False,
        "cpp_cache_precompile_headers": False,
        "aot_inductor.compile_wrapper_opt_level": "Og",
        "aot_inductor.enable_line_tables": False,
        "cpp.vec_isa_ok": True,
    }


@pytest.mark.parametrize("name", ["my tmp", "it's", 'a"b', "a\\b", "tab\there"])
def test_a_temporary_directory_that_pytorch_would_cut_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", f"/tmp/{name}")
    with pytest.raises(BuildError) as refused:
        check_directories()
    assert f"got {f'/tmp/{name}'!r}, expected a path without spaces" in str(refused.value)
    assert str(refused.value).endswith("name another in TMPDIR")


def test_a_pytorch_whose_directory_would_be_cut_is_refused_by_name(monkeypatch):
    """A virtual environment in such a directory: the linker would find no libtorch, a minute later."""
    monkeypatch.setattr("torch.__file__", "/home/my projects/.venv/lib/python3.12/site-packages/torch/__init__.py")
    with pytest.raises(BuildError) as refused:
        check_directories()
    assert str(refused.value) == (
        "PyTorch's directory: got '/home/my projects/.venv/lib/python3.12/site-packages/torch', expected a path without "
        "spaces, quotes and backslashes, which PyTorch does not quote; install it in another"
    )


def test_a_python_whose_libraries_would_be_cut_off_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("sysconfig.get_config_var", {"LIBDIR": "/opt/my python/lib"}.get)
    with pytest.raises(BuildError, match=r"directory of Python's libraries: got '/opt/my python/lib', .*; use another Python"):
        check_directories()


def test_a_usual_temporary_directory_is_taken(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/größer[1]#2")
    check_directories()


def test_no_temporary_directory_at_all(monkeypatch):
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(BuildError, match=r"temporary directory: .*No usable .* make room, or name one in TMPDIR"):
        check_directories()

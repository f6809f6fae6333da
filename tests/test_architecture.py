"""Dependencies point one way: backend and builder never import each other, plugins and the contract import neither. And what a
process does not need it does not import: PyTorch alone takes seconds and 200 MB."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "contract": {"contract"},
    "plugins": {"plugins"},
    "builder": {"builder", "contract", "plugins"},
    "backend": {"backend", "contract", "plugins"},
    "model_repository": {"backend"},
}
OURS = {"contract", "plugins", "builder", "backend", "tests", "benchmarks", "examples"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & OURS <= MAY_IMPORT[folder], path


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        ("backend.__main__", "torch transformers openai fastapi"),
        ("backend.serving", "torch transformers openai fastapi"),
        ("backend.openai_server.app", "torch transformers"),
        ("backend.triton_server.model", "torch transformers"),
        ("backend.worker backend.captured_loop plugins.attention.cuda plugins.feed_forward.cuda plugins.heads.cuda "
         "plugins.moe.cuda", "transformers torch._dynamo torch._inductor sympy"),
    ],
    ids=["command line", "serve", "OpenAI front end", "front", "worker on a GPU"],
)  # fmt: skip
def test_a_process_starts_without_what_it_does_not_need(modules, without):
    stand_in = "import sys, unittest.mock; sys.modules['triton_python_backend_utils'] = unittest.mock.MagicMock()"
    imports = f"import {', '.join(modules.split())}"
    told = f"print([each for each in {without.split()} if each in sys.modules])"
    code = "; ".join((stand_in, imports, told))
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("folder", ["contract", "plugins", "builder", "backend"])
def test_every_folder_is_a_package_that_is_installed(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), path


def test_files_are_short_enough_to_read():
    folders = (*MAY_IMPORT, "benchmarks", "examples", "checkpoints")
    long = {
        path: lines
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if (lines := path.read_text().count("\n")) > 320
    }
    assert not long

"""The import contracts hold, and each of them catches the break it is there for."""

import re
import shutil
import subprocess
import sys

import pytest

PROGRAM = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"

# A break that a hurried hand would make: file, line added to it, and the first words of the contract that must catch it.
BREAKS = {
    "weights reads a model": ("weights/planted.py", "import ernie45.models", "floors"),
    "tokens meets weights": ("tokens/planted.py", "import ernie45.weights", "floors"),
    "the engine reads the command line": ("engine/planted.py", "import ernie45.cli", "floors"),
    "a room without a floor": ("planted/__init__.py", "import ernie45.errors", "floors"),
    "the config of a model needs torch": ("models/config.py", "import torch", "decisions carry no tensors"),
    "a reference in the package": ("nn/planted.py", "import transformers", "reference implementations"),
    "two files need each other": ("nn/planted.py", "import ernie45.nn.planted_too", "no cycles"),
}


def broken_contracts(folder):
    """Names of the contracts that import-linter finds broken in a folder with a copy of the package."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=False)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert re.search(r"Contracts: \d+ kept, \d+ broken", plain), done.stdout + done.stderr
    return re.findall(r"^(.+) BROKEN", plain, re.MULTILINE)


@pytest.fixture
def copy(pytestconfig, tmp_path):
    """The package and its contracts, somewhere they may be broken."""
    shutil.copytree(pytestconfig.rootpath / "ernie45", tmp_path / "ernie45", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(pytestconfig.rootpath / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(copy):
    assert broken_contracts(copy) == []


@pytest.mark.parametrize("name", BREAKS)
def test_a_planted_break_is_caught(copy, name):
    place, line, contract = BREAKS[name]
    planted = copy / "ernie45" / place
    planted.parent.mkdir(exist_ok=True)
    with planted.open("a") as file:
        file.write(f"\n{line}\n")
    if "planted_too" in line:
        (planted.parent / "planted_too.py").write_text("import ernie45.nn.planted\n")
    assert [found for found in broken_contracts(copy) if found.startswith(contract)]

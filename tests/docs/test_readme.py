"""Every command and every Python block of the front page is run, as a reader would run it.

`make` is told to take the environment that runs the tests as it stands, so nothing is installed a second time; the starter model comes from
the reader's cache, or is made there. `make test` is this very run: of it only the recipe is checked.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 240


@pytest.fixture(scope="module")
def shell(tmp_path_factory, pytestconfig):
    """Runs a command line in bash, with this environment's commands on the path; returns what it printed."""
    place = tmp_path_factory.mktemp("reader")
    binaries = Path(sys.executable).parent
    # What the surrounding `make` passes down would change what the inner one does.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "ARGS")}
    env |= {"PATH": f"{binaries}{os.pathsep}{env['PATH']}", "NO_COLOR": "1"}

    def run(line, text="", folder=place):
        full = ["bash", "-o", "pipefail", "-c", line]
        done = subprocess.run(full, input=text, cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run.root = pytestconfig.rootpath
    stamps = " ".join(f"--assume-old={binaries.parent}/{stamp}" for stamp in (".run", ".test"))
    run.make = f"make --no-print-directory VENV={binaries.parent} {stamps}"
    return run


def test_the_front_page_opens_with_the_two_commands(readme):
    assert readme.commands()[:2] == ["make chat", "make test"]


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 30)
def test_make_chat_answers_through_a_pipe(shell):
    # greedy, so that the answer is the same in every run
    answer = shell(f"{shell.make} chat ARGS='--temperature 0 --max-tokens 32'", "What is the capital of France?\n", shell.root)
    assert "Paris" in answer


def test_make_test_runs_all_tests(shell):
    recipe = shell(f"{shell.make} --dry-run test", folder=shell.root)
    assert "-m pytest" in recipe.splitlines()[-1]
    told = recipe.splitlines()[-1].split("-m pytest")[1].split()
    assert told == ["--numprocesses", "logical", "--maxprocesses", "8", "--dist", "worksteal"]  # how, and no selection: everything


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS)
def test_every_other_command_runs(readme, shell):
    """In order and in one folder, since a later line may read what an earlier one wrote."""
    lines = [line for line in readme.commands() if not line.startswith("make ")]
    assert lines
    printed = {line: shell(line) for line in lines}
    assert all(text.strip() for text in printed.values()), printed
    assert "Paris" in next(text for line, text in printed.items() if "capital of France" in line)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_every_python_block_runs(readme, shell):
    blocks = readme.blocks("python")
    assert blocks
    for block in blocks:
        assert shell(f"{shlex.quote(sys.executable)} -", block).strip()


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_the_python_guide_runs(pages, shell):
    """From top to bottom, as one program: later blocks go on from earlier ones."""
    [page] = [page for page in pages if page.path.name == "python-api.md"]
    assert shell(f"{shlex.quote(sys.executable)} -", "\n".join(page.blocks("python"))).strip()

"""The course goes on where it was, says what is wrong, and its run files are runs of this project's commands."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from ernie45.cli import WORDS
from ernie45.errors import CheckpointError, RunError
from ernie45.recipes.settings import read_yaml
from story.__main__ import main
from story.course import RUNS, STAGES, Course, Plan, Step

FILES = sorted(RUNS.glob("*.yaml"))


class Short(Course):
    """A course of steps that only write down that they were done."""

    def __init__(self, plan, fails=""):
        super().__init__(plan, lambda line: None)
        self.fails, self.done = fails, []

    def steps(self):
        for name in ("one", "two", "three"):
            yield Step(name, self.out / name, lambda name=name: self.do(name))

    def do(self, name):
        if name == self.fails:
            raise RunError("killed")
        self.done.append(name)
        (self.out / name).write_text("done")


def test_what_is_done_is_not_done_again(tmp_path):
    plan = Plan(tmp_path / "out", tmp_path, 0.1)
    first = Short(plan, fails="two")
    with pytest.raises(RunError):
        first.run()
    second = Short(plan)
    second.run()
    assert (first.done, second.done) == (["one"], ["two", "three"])
    assert json.loads((tmp_path / "out" / "seconds.json").read_text()).keys() == {"one", "two", "three"}


def test_a_folder_holds_one_story(tmp_path):
    Short(Plan(tmp_path, tmp_path, 0.1)).run()
    with pytest.raises(RunError, match=r"holds a story with .*0.1.*, asked for is .*0.2.*; choose another --out"):
        Short(Plan(tmp_path, tmp_path, 0.2)).run()


def test_a_full_disk_is_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("story.course.ROOM", 10**18)
    course = Short(Plan(tmp_path, tmp_path))
    with pytest.raises(CheckpointError, match="bytes are to be written and the disk has"):
        course.run()
    assert course.done == []


def test_a_command_that_fails_is_told_with_its_words(tmp_path):
    course = Course(Plan(tmp_path, tmp_path), lambda line: None)
    with pytest.raises(RunError, match=r"`ernie pretrain` ended with 2: .*no option --stepz; did you mean '--steps'"):
        course._ernie("pretrain", "--stepz", "3")


@pytest.mark.parametrize("scale", ["0", "-1", "11", "nan"])
def test_a_scale_that_is_none_is_refused(scale, tmp_path, capsys):
    assert main(["--scale", scale, "--out", str(tmp_path)]) == 2
    assert "it is a share above 0" in capsys.readouterr().err


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_run_file_is_a_run(path):
    head = path.read_text().splitlines()[0].split()
    assert head == ["#", "ernie", head[2], "--config", f"runs/story/{path.name}"]
    entry = WORDS[head[2]]
    assert read_yaml(getattr(import_module(entry.module), entry.config), path, head[2])


def test_every_stage_has_its_run_file():
    assert [path.stem for path in FILES] == [*(f"{n}-{stage}" for n, stage in enumerate(STAGES, 1)), "6-quantize", "7-serve"]


def test_killed_it_leaves_no_command_behind(tmp_path):
    program = (
        "import subprocess, sys, time; from story.children import end_with_parent;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=end_with_parent);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as story:
        child = int(story.stdout.readline())
        story.kill()
    end = time.monotonic() + 20
    while time.monotonic() < end and _runs(child):
        time.sleep(0.05)
    left = _runs(child)
    if left:
        os.kill(child, signal.SIGKILL)
    assert not left


def _runs(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

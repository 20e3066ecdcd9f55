"""What `ernie watch` reads: logs that grow, shrink, break off, and hold nonsense."""

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from ernie45.server.run_log import LOG, MAX_MOMENTS, PLAN, SAMPLES, SETTINGS, Lines, RunFolder, curves, find_runs
from ernie45.server.watching import make_app

HOSTS = frozenset({"testserver", "127.0.0.1"})


def write(folder, rows, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / SETTINGS).write_text(json.dumps(facts))
    return folder


def row(step, **more):
    return {"step": step, "loss": 4.0 - step / 10, "tokens": 100, "seconds": 0.5, "load": [[1.5, 0.5], [1.0, 1.0]], **more}


def test_a_log_is_read_on_and_half_a_line_waits(tmp_path):
    path = tmp_path / LOG
    path.write_text('{"step": 0}\n{"step": 1')
    lines = Lines(path)
    assert lines.look() == [{"step": 0}]
    with path.open("a") as file:
        file.write('}\nnonsense\n[1]\n{"step": 2}\n')
    assert lines.look() == [{"step": 0}, {"step": 1}, {"step": 2}]
    path.write_text('{"step": 0}\n')  # resumed from an earlier checkpoint
    assert lines.look() == [{"step": 0}]
    os.replace(tmp_path / LOG, tmp_path / "gone")
    assert lines.look() == [{"step": 0}]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 20))
def test_points_keep_the_whole_run(losses, points):
    """However few the points: no step is left out of a mean, the range holds every loss, and what adds up adds up to the end."""
    rows = [{"step": i, "loss": loss, "tokens": 7, "seconds": 0.25} for i, loss in enumerate(losses)]
    drawn = curves(rows, points)
    assert len(drawn["step"]) <= points
    assert (drawn["step"][-1], drawn["tokens"][-1]) == (len(rows) - 1, 7 * len(rows))
    assert drawn["seconds"][-1] == pytest.approx(0.25 * len(rows), abs=1e-3)
    assert (min(drawn["loss.low"]), max(drawn["loss.high"])) == (min(losses), max(losses))
    sizes = [after - before for before, after in zip([-1, *drawn["step"]], drawn["step"], strict=False)]
    mean = sum(size * value for size, value in zip(sizes, drawn["loss"], strict=True)) / len(losses)
    assert mean == pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=1e-4 * max(map(abs, losses)) + 1e-6)


def test_numbers_that_are_none_are_left_out():
    drawn = curves([{"step": 0, "loss": math.nan, "margin": True}, {"step": 1, "loss": 2.0, "name": "x", "new_loss": 3}], 2)
    assert drawn["loss"] == [None, 2.0]
    assert drawn["new_loss"] == [None, 3.0]
    assert not {"margin", "name"} & set(drawn)


def test_a_run_says_how_it_stands(tmp_path):
    run = RunFolder(write(tmp_path / "run", [row(0), row(1, skipped=True), row(1)], model="tiny"), "run")
    (tmp_path / "run" / PLAN).write_text('{"steps": 9}')
    report = run.report()
    assert (report["state"], report["steps"], report["planned"], report["skipped"]) == ("running", 2, 9, 0)
    assert report["curves"]["load.max"] == [1.5, 1.5]
    assert "load" not in report["last"]
    os.utime(tmp_path / "run" / LOG, (1, 1))
    assert run.report()["state"] == "stopped"
    (tmp_path / "run" / "model").mkdir()
    assert run.report()["state"] == "finished"
    assert RunFolder(write(tmp_path / "other", []), "other").report()["state"] == "waiting"


def test_load_over_time_is_thinned_by_means(tmp_path):
    rows = [row(step, load=[[step % 2 * 2.0, 1.0]]) for step in range(4 * MAX_MOMENTS)]
    moments = RunFolder(write(tmp_path, rows), "run").load_over_time(0)
    assert len(moments["steps"]) == MAX_MOMENTS
    assert moments["loads"] == [[1.0, 1.0]] * MAX_MOMENTS
    assert RunFolder(tmp_path, "run").load_over_time(5) == {"steps": [], "loads": []}


@pytest.mark.parametrize("load", ["x", [1, 2], [[]], [["x"]], [[None]], {"a": 1}])
def test_a_load_of_another_form_is_passed_over(tmp_path, load):
    report = RunFolder(write(tmp_path, [row(0, load=load)]), "run").report()
    assert report["load"] == []
    assert "load.max" not in report["curves"]


def test_runs_are_found_and_named_apart(tmp_path):
    for name in ("a/x", "a/y", "b/x"):
        write(tmp_path / name, [row(0)])
    (tmp_path / "a" / "notes").mkdir()
    assert [run.name for run in find_runs([tmp_path / "a"])] == ["x", "y"]
    assert [run.name for run in find_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a" / "x"])] == ["a/x", "a/y", "b/x"]


@pytest.fixture
def client(tmp_path):
    write(tmp_path / "run", [row(0), row(1)], model="tiny")
    (tmp_path / "run" / SAMPLES).write_text('{"step": 1, "prompt": "<b>", "text": 5}\n')
    return TestClient(make_app([tmp_path], HOSTS))


def test_the_numbers_are_there(client):
    (run,) = client.get("/runs.json").json()["runs"]
    assert run["samples"] == [{"step": 1, "prompt": "<b>", "text": "5"}]
    assert client.get("/load.json", params={"run": "run", "layer": "0"}).json()["loads"][-1] == [1.5, 0.5]
    assert client.get("/").headers["content-security-policy"].startswith("default-src 'none'")


def test_a_run_that_starts_later_appears(client, tmp_path):
    write(tmp_path / "later", [row(0)])
    assert [run["name"] for run in client.get("/runs.json").json()["runs"]] == ["later", "run"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/load.json?run=../run&layer=0", 404),
        ("/load.json?run=run&layer=-1", 400),
        ("/load.json?run=run&layer=9999999999", 400),
        ("/load.json?run=run&layer=%C2%B2", 400),
        ("/web/..%2frun_log.py", 404),
        ("/run/log.jsonl", 404),
    ],
)
def test_nothing_else_is_handed_out(client, path, status):
    assert client.get(path).status_code == status


def test_other_sites_names_are_refused(client):
    assert client.get("/runs.json", headers={"host": "evil.example:80"}).status_code == 403
    assert client.get("/runs.json", headers={"host": "127.0.0.1:8010"}).status_code == 200


def test_the_load_of_vision_experts_stands_behind_that_of_text_experts(tmp_path):
    """A step without pictures has none of it, and leaves no mark in their picture."""
    seeing = {"vision_load": [[2.0, 0.0], [0.5, 1.5]], "vision_loss": 3.0}
    run = RunFolder(write(tmp_path, [row(0, **seeing), row(1), row(2, **seeing), row(3)]), "run")
    report = run.report()
    assert (report["load"], report["vision_load"]) == ([[1.5, 0.5], [1.0, 1.0]], [[2.0, 0.0], [0.5, 1.5]])
    assert report["curves"]["load.max"] == [2.0, 1.5, 2.0, 1.5]
    assert report["curves"]["vision_loss"] == [3.0, None, 3.0, None]
    assert run.load_over_time(2) == {"steps": [0, 2], "loads": [[2.0, 0.0], [2.0, 0.0]]}
    assert run.load_over_time(0)["steps"] == [0, 1, 2, 3]
    assert "vision_load" not in report["last"]

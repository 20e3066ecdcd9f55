"""The table of published models."""

import json

import pytest

from ernie45.cli import main
from ernie45.config import Environment
from ernie45.models.released import CHECKPOINTS
from ernie45.recipes.models import STARTER, is_cached, row, table
from ernie45.recipes.terminal import Style

# Published sizes and the sums over the tensors of the published files, to the parameter.
TOTALS = {
    "ERNIE-4.5-0.3B": 360_748_032,
    "ERNIE-4.5-21B-A3B": 21_825_437_888,
    "ERNIE-4.5-300B-A47B": 299_484_163_264,
    "ERNIE-4.5-VL-28B-A3B": 29_399_294_336,
    "ERNIE-4.5-VL-424B-A47B": 423_526_285_184,
    "starter": 134_515_008,
}
KV = {"ERNIE-4.5-0.3B": 18_432, "ERNIE-4.5-21B-A3B": 57_344, "ERNIE-4.5-300B-A47B": 221_184}


@pytest.fixture
def rows():
    return [row(release, False) for release in (*CHECKPOINTS.values(), STARTER)]


def test_json_gives_the_published_sizes_to_the_parameter(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ERNIE45_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert main(["models", "--json"]) == 0
    found = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert {name: found[name]["parameters"] for name in TOTALS} == TOTALS
    assert {name: found[name]["kv_bytes_per_token"] for name in KV} == KV
    assert found["ERNIE-4.5-21B-A3B"]["parameters_mtp"] == 123_217_920
    assert found["ERNIE-4.5-21B-A3B"]["active"] == 3_087_384_768
    assert found["ERNIE-4.5-0.3B"]["bytes"] == {"bf16": 721_496_064, "int8": 360_748_032, "int4": 180_374_016}
    assert "no ERNIE weights" in found["starter"]["note"]
    assert not any(model["cached"] for model in found.values())


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 140, 200])
def test_the_table_fits_every_window_with_a_line_per_model(rows, columns):
    lines = table(rows, Style(False, False), columns)
    assert max(map(len, lines)) <= columns
    assert all(any(line.startswith((r["name"].removeprefix("ERNIE-4.5-"), r["name"])) for line in lines) for r in rows)


def test_a_pipe_gets_every_column_with_exact_numbers(rows):
    lines = table(rows, Style(False, False), None)
    assert "299,484,163,264" in "\n".join(lines)
    titles = "model kind layers width heads/kv experts parameters active bf16 int8 int4 KV tied MTP vision context here"
    assert " ".join(lines[0].split()) == titles


def test_a_copy_counts_as_here_only_when_it_is_whole(tmp_path):
    environment = Environment(cache_dir=tmp_path / "ours", hf_home=tmp_path)
    release = CHECKPOINTS["ERNIE-4.5-0.3B"]
    snapshot = tmp_path / "hub" / "models--baidu--ERNIE-4.5-0.3B-PT" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert not is_cached(release, environment)
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    (snapshot / "one.safetensors").write_text("")
    assert not is_cached(release, environment)
    (snapshot / "two.safetensors").write_text("")
    assert is_cached(release, environment)
    (snapshot / "model.safetensors.index.json").write_text("[]")
    assert not is_cached(release, environment)
    assert not is_cached(STARTER, environment)
    (tmp_path / "ours" / "starter-0123").mkdir(parents=True)
    assert is_cached(STARTER, environment)

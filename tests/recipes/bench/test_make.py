"""`ernie bench make`."""

import json

import pytest

from ernie45.cli import main
from ernie45.models.load import load_model
from ernie45.recipes.bench.make import MakeConfig, every_shape


def test_a_shape_is_made_and_chats(tmp_path, capsys):
    assert main(["bench", "make", "tiny-experts", "--scheme", "w4a8-g32", "--out", str(tmp_path / "m")]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert made["bytes"] == sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors")) - header_bytes(tmp_path / "m")
    assert "random weights" in err
    rules = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["rules"]
    assert rules == [{"pattern": "embed", "scheme": "w8a8"}, {"pattern": "*", "scheme": "w4a8-g32"}]
    assert main(["chat", str(tmp_path / "m"), "--prompt", "hi", "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer_tokens"] == 4


def header_bytes(folder):
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


def test_whole_weights(tmp_path):
    assert main(["bench", "make", "tiny", "--scheme", "float32", "--out", str(tmp_path / "m")]) == 0
    assert load_model(tmp_path / "m").config == every_shape()["tiny"]


def test_the_list_names_every_shape(capsys):
    assert main(["bench", "make", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in every_shape())
    assert "43.9 GB" in text
    assert "VL-424B-A47B" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "needs a SHAPE"),
        (["21B-A3"], "did you mean '21B-A3B'"),
        (["VL-28B-A3B"], "is no shape"),
        (["tiny"], "--out is missing"),
        (["tiny", "--out", "x", "--scheme", "w3a8"], "is not a quantisation scheme"),
        (["tiny", "--out", "x", "--scheme", "w4a8", "--group", "48"], "is not a quantisation scheme"),
        (["tiny", "--out", "x", "--scheme", "w4a8", "--head", "q8"], "is not a quantisation scheme"),
        (["tiny", "--out", "x", "--seed", "-1"], "--seed is -1"),
        (["300B-A47B", "--out", "x"], "bytes are to be written and the disk has"),
    ],
)
def test_a_mistake_is_said_and_nothing_written(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "make", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_head_can_stay_whole():
    spec = MakeConfig(shape="300B-A47B", out="x", scheme="w4a8", head="whole").spec()
    assert spec.scheme_for("head") is None
    assert str(spec.scheme_for("layers.3.ffn.experts")) == "w4a8-g64"

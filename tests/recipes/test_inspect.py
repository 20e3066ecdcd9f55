"""What `ernie inspect` finds in whole, damaged and foreign folders."""

import io
import json
import shutil

import pytest
import torch

from ernie45.cli import main
from ernie45.config import Environment
from ernie45.models.released import tiny
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.recipes.inspect import InspectConfig, inspect, report, run
from ernie45.recipes.terminal import Style


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole folder of a tiny mixture of experts in three shards."""
    folder = tmp_path_factory.mktemp("made") / "model"
    decoder = Decoder(tiny(experts=True, num_mtp=1)).initialise(torch.Generator().manual_seed(0))
    save_model(decoder, folder, shard_bytes=1_000_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, sum(tensor.numel() for tensor in decoder.state_dict().values())


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "model")


def text(found):
    return "\n".join(report(found, Style(False, False)))


def test_a_whole_folder_has_no_problems(folder, made):
    found = inspect(folder, check=True)
    assert found.problems == []
    assert found.layout == "PT (PyTorch)"
    assert found.family == "ernie4_5_moe"
    assert found.parameters == made[1]
    assert found.memory == {"float32": 4 * made[1], "bfloat16": 2 * made[1]}
    assert found.tensor_bytes == sum(kind["bytes"] for kind in found.numbers.values()) == 4 * made[1]
    assert "every number is finite" in text(found)
    assert "8 experts of width 64 (2 per token, 1 shared), multi-token prediction, tied head" in text(found)
    assert any("text prompts will not work" in note for note in found.notes)


def test_the_weights_are_not_read_unless_asked(folder):
    first = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(first.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # NaN in the last number
    first.write_bytes(data)
    assert inspect(folder).problems == []
    problems = inspect(folder, check=True).problems
    assert len(problems) == 1
    assert "NaN" in problems[0] or "finite" in problems[0]


def test_a_truncated_shard_leaves_the_rest_of_the_story(folder):
    first = sorted(folder.glob("*.safetensors"))[0]  # it has the embedding, by which the layout is known
    first.write_bytes(first.read_bytes()[:-100])
    found = inspect(folder)
    assert any(first.name in problem for problem in found.problems)
    assert any("missing (" in problem for problem in found.problems)
    assert found.tensors > 0
    assert found.layout == "PT (PyTorch)"


def test_several_wounds_are_all_told(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    (folder / "model.safetensors.index.json").write_text("{")
    found = inspect(folder)
    assert any("index.json" in problem for problem in found.problems)
    assert any("of the wrong shape" in problem for problem in found.problems)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ('{"model_type": "llama"}', "llama"),
        ('{"model_type": "ernie4_5_moe_vl"}', "vision_config"),
        ("", "JSON"),
    ],
)
def test_a_bad_config_is_told_once_and_the_tensors_are_still_counted(folder, content, says):
    (folder / "config.json").write_text(content)
    found = inspect(folder)
    assert sum(says in problem for problem in found.problems) == 1
    assert found.tensors > 0


def test_a_folder_without_a_config_says_so(folder):
    (folder / "config.json").unlink()
    assert any("config.json" in problem for problem in inspect(folder).problems)


def test_an_empty_folder_and_a_foreign_file_are_no_models(tmp_path):
    assert inspect(tmp_path).problems
    (tmp_path / "notes.txt").write_text("hello")
    assert inspect(tmp_path / "notes.txt").problems
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    found = inspect(tmp_path / "bad.gguf")
    assert len(found.problems) == 1
    assert "bad.gguf" in found.problems[0]


def test_one_shard_can_be_looked_at_alone(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    found = inspect(shard, check=True)
    assert found.problems == []
    assert found.tensors > 0
    assert list(found.files) == [shard.name]


def test_json_and_exit_codes(folder, capsys):
    environment = Environment(cache_dir=folder.parent / "cache", offline=True)
    assert run(InspectConfig(path=str(folder), json=True), environment) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["problems"] == []
    assert data["largest"][0]["bytes"] >= data["largest"][1]["bytes"]
    (folder / "config.json").unlink()
    assert run(InspectConfig(path=str(folder)), environment) == 1
    assert "problem" in capsys.readouterr().out


def test_names_in_files_cannot_command_the_terminal(folder):
    evil = "\x1b[2J"
    (folder / "config.json").write_text(json.dumps({"model_type": evil}))
    assert "\x1b" not in text(inspect(folder))


def test_an_unknown_name_is_one_message(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ERNIE45_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert main(["inspect", "startre"]) == 2
    assert "starter" in capsys.readouterr().err

"""What lies beside a model's weights goes along, whichever command writes the next folder."""

import json
import shutil

import pytest
import torch

from ernie45.models.save import COMPANIONS
from ernie45.recipes.export import ExportConfig, run
from ernie45.tokens.pictures import FONT, read_pixel_rules
from tests.recipes.lessons import ernie

BESIDE = {"LICENSE": b"Apache", FONT: b"a font", "generation_config.json": b'{"temperature": 0.5}', "chat_template.jinja": None}


@pytest.fixture(scope="module")
def furnished(seer, tmp_path_factory):
    """A tiny model that sees, with everything that a published one has beside its weights."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("furnished") / "model"
    shutil.copytree(seer, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(settings.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in BESIDE.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def check(made, source):
    for name in COMPANIONS:
        assert (made / name).is_file() == (source / name).is_file(), name
    for name in BESIDE:
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert read_pixel_rules(made).font == str(made / FONT), "timestamps are drawn as the original's"
    assert "licence of the base model" in (made / "README.md").read_text()


def test_after_export(furnished, tmp_path, environment):
    assert run(ExportConfig(model=str(furnished), out=tmp_path / "out", format="folder", type="bf16"), environment) == 0
    check(tmp_path / "out", furnished)


def test_after_learning(furnished, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"src": ["What is up?"], "tgt": ["The sky."]}) + "\n")
    assert ernie("sft", furnished, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run", "--steps", 1, "--batch-tokens", 64) == 0
    check(tmp_path / "run" / "model", furnished)

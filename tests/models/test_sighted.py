"""The model that comes with the repository, where it has been made."""

import json

import pytest

from ernie45.config import Environment
from ernie45.errors import CheckpointError
from ernie45.models import sighted
from ernie45.models.load import find_model


def test_the_name_leads_to_its_folder_or_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sighted, "__file__", str(tmp_path / "sighted.py"))
    with pytest.raises(CheckpointError, match="the model 'sighted' is not there; `make story` makes it"):
        find_model("sighted", Environment.read())
    made = tmp_path / sighted.FOLDER.name
    made.mkdir()
    (made / "config.json").write_text(json.dumps({}))
    assert find_model("sighted", Environment.read()) == made

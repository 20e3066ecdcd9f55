"""What `ernie sft` and `align` refuse before they learn, and what a refused command leaves as it was."""

import os

import pytest
import torch

from ernie45.errors import DataError, RunError
from ernie45.models.load import load_model
from ernie45.models.save import save_model
from ernie45.train.lock import locked
from ernie45.weights.digest import BLOCK, WHOLE, digest_of_model
from tests.recipes.lessons import Stop, chatting_folder, ernie, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_tokenizer_larger_than_the_model_is_named(rows, pairs, tmp_path, capsys):
    """Without the check the embedding ends with an IndexError; words of the tokenizer go to 299, of the model to 199."""
    small = chatting_folder(tmp_path / "small", vocabulary=200)
    for words in (
        ("sft", small, "--data", rows),
        ("align", small, "--data", pairs),
        ("align", small, "--data", pairs, "--preference.loss", "kto"),
    ):
        with pytest.raises(DataError, match=r"line 1: holds the id 2\d\d, and the model's vocabulary has 200 words"):
            ernie(*words, "--out", tmp_path / "run", "--dry-run")


@pytest.fixture
def stopped(rows, tmp_path, monkeypatch):
    """A LoRA run that was stopped after its first checkpoint: the words that would take it up again."""
    base = chatting_folder(tmp_path / "base")
    words = ("sft", base, "--data", rows, "--out", tmp_path / "run", "--steps", 6, "--save-every", 2, "--batch-tokens", 128)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(Stop):
            ernie(*words)
    return words


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_adapters_do_not_go_on_over_another_base(stopped, tmp_path):
    other = load_model(tmp_path / "base").initialise(torch.Generator().manual_seed(1), std=0.1)
    save_model(other, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "base" / "model.safetensors")
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match="its weights"):
        ernie(*stopped)
    assert contents(tmp_path / "run") == before


def test_a_refused_command_leaves_the_folder_as_it_was(stopped, tmp_path):
    run = tmp_path / "run"
    before = contents(run)
    assert run / "settings.json" in before
    with pytest.raises(RunError, match="other settings"):
        ernie(*stopped, "--schedule.peak", "1e-3")
    assert contents(run) == before
    with locked(run), pytest.raises(RunError, match="another run"):
        ernie(*stopped, "--schedule.peak", "1e-3")
    assert contents(run) == before
    assert ernie(*stopped) == 0


def test_sampled_digests_see_both_ends_and_the_size(tmp_path):
    """A large file (here one of holes) is read in blocks; a small one whole."""
    large, size = tmp_path / "model.safetensors", WHOLE + 5 * BLOCK
    large.touch()
    os.truncate(large, size)
    (tmp_path / "config.json").write_text("{}")
    seen = {digest_of_model(tmp_path)}
    for place in (0, 16 * 2**20, size - 1):
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(digest_of_model(tmp_path))
    os.truncate(large, size + 1)
    seen.add(digest_of_model(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert len(seen | {digest_of_model(tmp_path)}) == 6

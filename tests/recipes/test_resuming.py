"""What `ernie sft` and `align` refuse before they learn, and what a refused command leaves as it was."""

import pytest

from ernie45.errors import DataError
from tests.recipes.lessons import chatting_folder, ernie

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

"""`sighted`: the small mixture of experts that sees and comes with the repository, trained from nothing by `make story`.

It is no ERNIE model. Its card, README.md in the folder, says what it learned from, what it knows and what not.
"""

from pathlib import Path

from ernie45.errors import CheckpointError

SIGHTED_NAME = "sighted"
FOLDER = Path("ernie45") / "models" / "sighted_model"
"""Where it lies, from the repository's root on."""


def sighted_folder() -> Path:
    """The folder of the model. Raises CheckpointError where it was not made yet."""
    folder = Path(__file__).with_name(FOLDER.name)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: the model 'sighted' is not there; `make story` makes it, in a checkout of the repository")
    return folder

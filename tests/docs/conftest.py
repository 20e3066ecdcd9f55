"""The documentation as commands and programs."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A Markdown file and the fenced blocks in it."""

    path: Path

    def blocks(self, language: str) -> list[str]:
        """The text of every block in a language, in order."""
        return [text for kind, text in FENCE.findall(self.path.read_text("utf-8")) if kind == language]

    def commands(self) -> list[str]:
        """Every line of the shell blocks; lines that end in a backslash are one."""
        joined = "\n".join(self.blocks("sh")).replace("\\\n", " ")
        return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


@pytest.fixture(scope="session")
def readme() -> Page:
    """The front page."""
    return Page(ROOT / "README.md")


@pytest.fixture(scope="session")
def pages() -> list[Page]:
    """Every page a reader is sent to."""
    return [Page(path) for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]]


@pytest.fixture(scope="session")
def ernie_commands(pages) -> list[tuple[str, list[str]]]:
    """(file name, words after `ernie`) of every `ernie` command in a shell block, pipes taken apart."""
    found = []
    for page in pages:
        for line in page.commands():
            for part in re.split(r"\s\|\s", line):
                words = shlex.split(part)
                if words[0] == "ernie":
                    found.append((page.path.name, words[1:]))
    return found

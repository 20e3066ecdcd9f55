"""The files that the house rules speak about, read once."""

import ast
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the root of the repository, and its text."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The file's syntax tree."""
        return ast.parse(self.text, str(self.path))

    @property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    @property
    def imports(self) -> set[str]:
        """Top-level names of everything imported anywhere in the file."""
        plain = {alias.name for node in ast.walk(self.tree) if isinstance(node, ast.Import) for alias in node.names}
        named = {node.module for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom) and node.module}
        return {name.split(".")[0] for name in plain | named}

    @property
    def written_lines(self) -> int:
        """Lines that are not blank."""
        return sum(1 for line in self.text.splitlines() if line.strip())


def read_all(folder: str) -> list[Source]:
    """Every Python file under a folder of the repository, in order."""
    return [Source(path.relative_to(ROOT), path.read_text("utf-8")) for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="session")
def package() -> list[Source]:
    """The files of `ernie45`."""
    return read_all("ernie45")


@pytest.fixture(scope="session")
def tests() -> list[Source]:
    """The files of the test suite."""
    return read_all("tests")


@pytest.fixture(scope="session")
def none():
    """Fails with every breach that was found, one a line: a shortened list would be found out piece by piece."""

    def check(found):
        if found:
            pytest.fail("\n".join(map(str, found)), pytrace=False)

    return check


@pytest.fixture(scope="session")
def planted():
    """Builds a source from text, to show that a rule catches what it is there for."""
    return lambda text, path="ernie45/planted.py": Source(Path(path), text)


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """Every file that git tracks, from the root of the repository."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]

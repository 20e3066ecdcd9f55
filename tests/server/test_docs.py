"""What the server's pages say is so: tests that the security table names exist, routes and limits of the guide are all there."""

import dataclasses
import re

import pytest

from ernie45.server.app import routes_of
from ernie45.server.settings import Limits


@pytest.fixture
def docs(pytestconfig):
    return lambda name: (pytestconfig.rootpath / "docs" / name).read_text("utf-8")


def test_the_security_table_has_every_row_and_names_tests_that_exist(docs, pytestconfig):
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| (.+) \|$", docs("serve-security.md"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 39))
    for number, text in rows:
        file = None
        for word in re.findall(r"`([^`]+)`", text):
            found = re.fullmatch(r"((?:tests/)?[\w/]*test_\w+\.py)?(?:::(test_\w+))?", word)
            if not found or not word:
                continue
            file = found[1] or file
            path = pytestconfig.rootpath / (file if file.startswith("tests/") else f"tests/server/{file}")
            assert path.exists(), f"row {number}: {word}"
            if found[2]:
                assert f"def {found[2]}(" in path.read_text("utf-8"), f"row {number}: {word}"
        assert file or any(words in text for words in ("cannot apply", "row 1's", "row 8", "row 24", "tests/tokens", "not pinned")), number


def test_the_guide_has_every_route(docs, running):
    page = docs("guides/serve.md")
    for route in routes_of(running.server.config.app):
        path = route.path.replace("{name:path}", "NAME").replace("{name}", "NAME").replace("{id}", "ID")
        assert path in page or path == "/docs/oauth2-redirect", path


def test_the_guide_has_every_limit(docs):
    page = docs("guides/serve.md")
    assert [item.name for item in dataclasses.fields(Limits) if f"--limits.{item.name.replace('_', '-')}" not in page] == []

"""What the pages say about commands, files and errors is so."""

import re
import subprocess
import sys
from functools import cache

from ernie45 import errors
from ernie45.cli import WORDS, split_word


@cache
def flags_of(word):
    """The flags that `ernie WORD --help` shows."""
    program = "import sys; from ernie45.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, *word.split(), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][a-z.-]*", done.stdout))


def test_every_command_that_a_page_shows_exists(ernie_commands):
    assert len(ernie_commands) > 10
    assert [(page, words) for page, words in ernie_commands if split_word(words)[0] not in WORDS] == []


def test_every_flag_that_a_page_shows_exists(ernie_commands):
    shown = [(page, split_word(words)[0], word) for page, words in ernie_commands for word in words if word.startswith("--")]
    assert len(shown) > 10
    assert [(page, name, flag) for page, name, flag in shown if flag not in flags_of(name)] == []


def test_the_flags_of_the_chat_guide_are_all_there(pages):
    [guide] = [page for page in pages if page.path.name == "chat.md"]
    table = re.findall(r"^\| `(--[a-z-]+)", guide.path.read_text("utf-8"), re.MULTILINE)
    assert table
    assert set(table) <= flags_of("chat")


def test_the_readme_names_every_command(readme):
    assert set(re.findall(r"^\| `ernie ([a-z-]+(?: [a-z]+)?)", readme.path.read_text("utf-8"), re.MULTILINE)) == set(WORDS)


def test_the_errors_page_explains_every_class(pages):
    [page] = [page for page in pages if page.path.name == "errors.md"]
    explained = set(re.findall(r"^## (\w+(?:Error|Extra))$", page.path.read_text("utf-8"), re.MULTILINE))
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.ErnieError)}
    assert explained == kinds - {"ErnieError"}


def test_links_of_the_front_page_lead_somewhere(readme, pytestconfig):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", readme.path.read_text("utf-8"))
    assert targets
    assert [target for target in targets if not (pytestconfig.rootpath / target).exists()] == []

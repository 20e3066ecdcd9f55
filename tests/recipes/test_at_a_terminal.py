"""The chat in a real terminal: keys, pastes, Ctrl-C, history, windows of odd size."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("pty", reason="a pseudo-terminal exists on Unix only")

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from script_speaker import ScriptSpeaker
from ernie45.config import Environment
from ernie45.recipes.session import Session

script, pause, cache = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
session = Session(ScriptSpeaker(script, pause=pause), Environment(cache_dir=cache, no_color=True))
code = session.run()
print("turns", [(t.role, t.content, t.interrupted) for t in session.turns], "END")
sys.exit(code)
"""
PROMPT = "›"
UP, ALT_ENTER = "\x1b[A", "\x1b\r"


@pytest.fixture
def start(PseudoTerminal, tmp_path):
    running = []

    def run(script="Fine, thank you.", pause=0.0, **size):
        program = PROGRAM.format(here=str(Path(__file__).parent))
        running.append(PseudoTerminal([sys.executable, "-c", program, script, str(pause), str(tmp_path / "cache")], {}, **size))
        running[-1].wait("Enter sends")
        running[-1].wait(PROMPT)
        return running[-1]

    yield run
    for terminal in running:
        terminal.__exit__()


def leave(terminal):
    terminal.type("\x04")
    turns = terminal.wait(r"turns (\[.*\]) END").group(1)
    assert terminal.exit_code() == 0
    return turns


def test_a_conversation_with_line_breaks_pastes_and_emoji(start):
    terminal = start()
    terminal.type("How are")
    terminal.type(ALT_ENTER)
    terminal.type("you 中 🎉?")
    terminal.type("\r")
    terminal.wait(r"thank you\.")
    terminal.wait("3 tokens")
    terminal.wait(PROMPT)
    terminal.type("\x1b[200~pasted\nin two lines\x1b[201~")  # a bracketed paste, as terminals send it
    terminal.type("\r")
    terminal.wait("3 tokens")
    terminal.wait(PROMPT)
    terminal.type("a backslash \\\rbreaks too\r")
    terminal.wait("3 tokens")
    terminal.wait(PROMPT)
    turns = leave(terminal)
    assert r"'How are\nyou 中 🎉?'" in turns
    assert r"'pasted\nin two lines'" in turns
    assert r"'a backslash \nbreaks too'" in turns


def test_ctrl_c_stops_the_answer_and_not_the_program(start):
    terminal = start("one two three four five six seven eight", pause=0.3)
    terminal.type("Count\r")
    terminal.wait("two")
    assert not terminal.echoes()
    terminal.interrupt()
    terminal.wait(r"stopped · \d tokens")
    terminal.wait(PROMPT)
    turns = leave(terminal)
    assert "('assistant', 'one two" in turns
    assert "eight" not in turns
    assert "True)]" in turns
    assert terminal.seen.count("\x1b[?25h") >= terminal.seen.count("\x1b[?25l")  # the cursor is back


def test_ctrl_c_empties_the_line_first_and_leaves_at_the_second_on_an_empty_one(start):
    terminal = start()
    terminal.type("some words\x03")
    terminal.wait("Ctrl-C again or Ctrl-D leaves|" + PROMPT)
    terminal.wait(PROMPT)
    terminal.type("\x03")
    terminal.wait("Ctrl-C again or Ctrl-D leaves")
    terminal.wait(PROMPT)
    terminal.type("\x03")
    terminal.wait(r"turns \[\] END")
    assert terminal.exit_code() == 0


def test_the_history_outlives_the_session_and_is_private(start, tmp_path):
    first = start()
    first.type("remember me\r")
    first.wait("3 tokens")
    first.wait(PROMPT)
    leave(first)
    history = tmp_path / "cache" / "chat_history"
    assert "remember me" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
    second = start()
    second.type(UP + "\r")
    second.wait("3 tokens")
    second.wait(PROMPT)
    assert "('user', 'remember me'" in leave(second)


def test_a_huge_paste_is_refused_with_numbers(start):
    terminal = start()
    terminal.type("\x1b[200~" + "word " * 3000 + "\x1b[201~")
    terminal.type("\r")
    terminal.wait(r"3,000\s+tokens", seconds=60)
    terminal.wait(PROMPT)
    assert leave(terminal) == "[]"


@pytest.mark.parametrize("size", [(20, 10), (40, 5), (300, 60)])
def test_odd_windows_are_no_trouble(start, size):
    terminal = start("# Title\n\n" + "many words " * 30 + "\n\n```python\nx = 1\n```\n", columns=size[0], rows=size[1])
    terminal.type("Hi\r")
    terminal.wait("tokens/s")
    terminal.wait(PROMPT)
    assert "many words" in leave(terminal)


def test_commands_complete(start):
    terminal = start()
    terminal.type("/sta")
    terminal.wait("settings, speed")
    terminal.type("\t")
    terminal.type("\r")
    terminal.wait("compute type")
    terminal.wait(PROMPT)
    leave(terminal)

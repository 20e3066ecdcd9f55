"""A chat session without a model and without a person: what each input does."""

import os
import re
import signal

import pytest

from ernie45.recipes.answer import AnswerView, Outcome, Piece, summary
from ernie45.recipes.conversation import Turn, load
from ernie45.recipes.session import COMMANDS, Session
from ernie45.recipes.terminal import Style


@pytest.fixture
def session(Screen, ScriptSpeaker, environment, monkeypatch):
    monkeypatch.setattr("ernie45.recipes.session.terminal_size", lambda: (200, 50))

    def make(script="The answer is **forty-two**.", **options):
        return Session(ScriptSpeaker(script, **options), environment, stream=Screen(200, 50))

    return make


def seen(session):
    return "\n".join(session.stream.text)


def test_a_question_is_answered_and_kept(session):
    chat = session()
    chat.take("What is it?")
    assert "The answer is forty-two." in seen(chat)
    assert "4 tokens · 7.5 tokens/s · first after 0.01 s · context 7 of 1,000" in seen(chat)
    assert chat.turns == [Turn(role="user", content="What is it?"), Turn(role="assistant", content="The answer is **forty-two**.")]
    chat.take("Why?")
    assert len(chat.speaker.asked[-1]) == 3
    assert chat.speaker.replies[-1].closed
    assert not chat.stream.hidden


def test_the_model_cannot_command_the_terminal(session):
    chat = session("evil \x1b[2J\x1b]0;title\x07 \x9b31m done")
    chat.take("Hi")  # the screen refuses sequences it does not know
    assert "evil ␛[2J␛]0;title␇ \ufffd31m done" in seen(chat)
    assert "\x1b[2J" in chat.turns[-1].content


def test_a_stopped_answer_is_kept_and_marked(session, monkeypatch):
    chat = session("one two three four")
    push = AnswerView.push

    def press(view, piece):
        push(view, piece)
        if "two" in piece.text:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(AnswerView, "push", press)
    before = signal.getsignal(signal.SIGINT)
    chat.take("Count")
    assert chat.turns[-1] == Turn(role="assistant", content="one two", interrupted=True)
    assert "stopped · 2 tokens" in seen(chat)
    assert chat.speaker.replies[-1].closed
    assert signal.getsignal(signal.SIGINT) is before
    chat.take("Go on")
    assert chat.speaker.asked[-1][1].content == "one two"


def test_reasoning_is_folded_and_can_be_shown(session):
    chat = session("Yes.", reasoning="first this then that")
    chat.take("Is it?")
    assert "▸ thought for" in seen(chat)
    assert "first this" not in seen(chat)
    chat.take("/reasoning")
    assert "first this then that" in seen(chat)
    assert chat.turns[-1].reasoning.strip() == "first this then that"


def test_old_messages_are_dropped_aloud_and_stay_in_the_file(session, tmp_path):
    chat = session("word " * 8, limit=40)
    chat.max_tokens = 10
    chat.take("/system be brief")
    for n in range(4):
        chat.take(f"question number {n} is this")
    assert "oldest messages are left out of this prompt; it has the system message and the rest" in seen(chat)
    assert chat.speaker.asked[-1][0].content == "be brief"
    assert len(chat.turns) == 9
    chat.take(f"/save {tmp_path / 'all.json'}")
    assert load(tmp_path / "all.json") == chat.turns


def test_a_question_that_cannot_fit_is_refused_with_numbers_and_forgotten(session):
    chat = session(limit=20)
    chat.max_tokens = 5
    chat.take("word " * 30)
    assert "30 tokens" in seen(chat)
    assert "context of this model is 20" in seen(chat)
    assert chat.turns == []


def test_retry_asks_the_same_again(session):
    chat = session()
    chat.take("What?")
    chat.take("/retry")
    assert chat.speaker.asked[0] == chat.speaker.asked[1]
    assert len(chat.turns) == 2
    assert chat.retries == 1


def test_system_is_set_replaced_and_shown(session):
    chat = session()
    chat.take("/system")
    assert "no system message" in seen(chat)
    chat.take("Hi")
    chat.take("/system be kind")
    chat.take("/system be brief")
    assert [turn.role for turn in chat.turns] == ["system", "user", "assistant"]
    assert chat.turns[0].content == "be brief"
    chat.take("/clear")
    assert [turn.role for turn in chat.turns] == ["system"]


def test_save_and_load_carry_a_conversation_over(session, tmp_path):
    chat, path = session(), tmp_path / "chat.json"
    chat.take("Hi")
    chat.take(f"/save {path}")
    chat.take(f"/save {path}")  # its own file may be replaced
    assert "exists" not in seen(chat)
    other = session()
    other.take(f"/load {path}")
    assert other.turns == chat.turns
    assert "› Hi" in seen(other)
    third = session()
    third.take(f"/save {path}")
    assert "/save! " in seen(third)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/sav x", "did you mean '/save'?"),
        ("/etc/hosts is what?", "begin with a space"),
        ("/save", "needs a file name"),
        ("/load", "needs the name of a file"),
        ("/load nowhere.json", "cannot read nowhere.json"),
        ("/retry", "ask something first"),
        ("/reasoning", "without reasoning"),
        ("/stats", "compute type"),
        ("/help", "Alt-Enter"),
    ],
)
def test_each_command_says_what_to_do(session, text, says):
    chat = session()
    chat.take(text)
    assert says in seen(chat)
    assert chat.turns == []
    assert not chat.leaving


def test_exit_leaves_and_help_names_every_command(session):
    chat = session()
    chat.take("/help")
    assert all(re.search(rf"^  {re.escape(word)}\b|^  {re.escape(word)} ", seen(chat), re.M) for word in COMMANDS)
    chat.take("/exit")
    assert chat.leaving


@pytest.mark.parametrize("text", ["", "   ", "\n\n"])
def test_an_empty_line_asks_nothing(session, text):
    chat = session()
    chat.take(text)
    assert chat.speaker.asked == []


def test_text_after_a_space_may_start_with_a_slash(session):
    chat = session()
    chat.take(" /etc/hosts is what?")
    assert chat.turns[0].content == " /etc/hosts is what?"


def test_thinking_is_shown_through_a_window_while_it_goes_on(Screen):
    screen, now = Screen(40, 30), [0.0]
    view = AnswerView(screen, Style(False, False), lambda: (40, 30), lambda: now[0])
    for n in range(60):
        now[0] += 1.0
        view.push(Piece("reasoning", f"thought {n} "))
    assert screen.text[0] == "▾ thinking"
    assert len(screen.text) <= 7
    assert "thought 59" in screen.text[-2]
    view.push(Piece("content", "Done."))
    now[0] += 1.0
    view.finish([])
    assert screen.text[0].startswith("▸ thought for 60.0 s")
    assert "Done." in screen.text


@pytest.mark.parametrize(
    ("tokens", "reason", "first", "total", "text"),
    [
        (0, "stop", None, 1.0, "0 tokens · context 5 of 10"),
        (1, "stop", 0.5, 0.5, "1 token · first after 0.50 s · context 6 of 10"),
        (3, "length", 0.5, 1.5, "cut at the token limit · 3 tokens · 2.0 tokens/s · first after 0.50 s · context 8 of 10"),
    ],
)
def test_the_line_under_an_answer(tokens, reason, first, total, text):
    outcome = Outcome(prompt_tokens=5, answer_tokens=tokens, finish_reason=reason, first_token_s=first, total_s=total)
    assert summary(outcome, 10, False) == text

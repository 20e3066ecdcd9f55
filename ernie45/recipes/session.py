"""The chat session: a prompt with history and commands, answers that stream and can be stopped, and nothing that ends it by accident."""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ernie45.config import Environment
from ernie45.errors import ConfigError, ErnieError, RequestError, did_you_mean
from ernie45.recipes.answer import AnswerView, Outcome, Speaker, headline, resources, summary
from ernie45.recipes.conversation import Turn, fit, load, save
from ernie45.recipes.markdown import MarkdownLines
from ernie45.recipes.terminal import Interrupt, Style, clean, hidden_cursor, quiet_keyboard

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer


@dataclass(frozen=True)
class Command:
    """One `/word`: what it takes, what it does, and what does it."""

    takes: str
    does: str
    run: Callable[["Session", str], None]


@dataclass
class Session:
    """One conversation at a terminal. The turns are the state; everything else is how it looks."""

    speaker: Speaker
    environment: Environment
    max_tokens: int | None = None
    turns: list[Turn] = field(default_factory=list)
    stream: IO[str] = field(default_factory=lambda: sys.stdout)

    def __post_init__(self) -> None:
        self.style = Style.of(self.stream, self.environment)
        self.outcomes: list[Outcome] = []
        self.retries = 0
        self.leaving = False
        self.shown: dict[str, tuple[str, ...]] = {"image": (), "video": ()}  # files that go with the next question
        self.written: set[Path] = set()  # files of this session: /save may replace them without asking

    def run(self) -> int:
        """Prompt and answer until the person leaves; returns the exit code."""
        prompt = input_line(self.environment, self.style)
        self.say(self.style.bold(clean(self.speaker.name)), self.style.dim(headline(self.speaker)))
        for line in resources(self.speaker.settings()):
            self.say(self.style.dim(clean(line)))
        self.say(self.style.dim("Enter sends, Alt-Enter breaks the line, Ctrl-C stops an answer, /help lists the commands."), "")
        warned = False
        while not self.leaving:
            try:
                text = prompt.prompt()
            except KeyboardInterrupt:
                if warned:
                    break
                warned = not prompt.default_buffer.text
                if warned:
                    self.say(self.style.dim("Ctrl-C again or Ctrl-D leaves."))
                continue
            except EOFError:
                break
            warned = False
            self.take(text.encode("utf-8", "replace").decode("utf-8"))
        return 0

    def take(self, text: str) -> None:
        """Do what one submitted input says. A mistake is told and the session goes on."""
        try:
            if text.startswith("/"):
                self.command(text)
            elif text.strip():
                self.ask(text.strip("\n"))
        except ErnieError as error:
            self.say(self.style.warning(clean(str(error))), "")

    def command(self, text: str) -> None:
        """Run a `/word`. Raises `ConfigError` for an unknown one."""
        word, _, argument = text.strip().partition(" ")
        if word not in COMMANDS:
            near = did_you_mean(word, COMMANDS)
            raise ConfigError(f"{word} is no command{near}; begin with a space to send text that starts with a slash")
        COMMANDS[word].run(self, argument.strip())

    def ask(self, text: str) -> None:
        """Send a question. When it cannot be answered at all, it does not stay in the conversation."""
        self.turns.append(Turn(role="user", content=text, images=self.shown["image"], videos=self.shown["video"]))
        self.retries = 0
        try:
            self.answer()
        except ErnieError:
            self.turns.pop()
            raise
        self.shown = {"image": (), "video": ()}

    def show(self, kind: str, name: str) -> None:
        """A file that goes with the next question. Raises an `ErnieError` that says why the model cannot see it; then it does not go."""
        files = self.shown | {kind: (*self.shown[kind], name)}
        asked = Turn(role="user", content="", images=files["image"], videos=files["video"])
        tokens = self.speaker.count([asked]) - self.speaker.count([Turn(role="user", content="")])
        self.shown = files
        self.say(self.style.dim(f"{clean(name)} goes with your next message; its pictures take {tokens:,} tokens."), "")

    def answer(self) -> None:
        """Stream the answer to the last turn and keep it, also when it was stopped halfway."""
        fitted = fit(self.turns, self.speaker.count, self.speaker.limit, self.max_tokens)
        if fitted.dropped:
            kept = "the system message and " if fitted.turns[0].role == "system" else ""
            self.say(
                self.style.warning(
                    f"The context of {self.speaker.limit:,} tokens is full: "
                    f"the {fitted.dropped} oldest messages are left out of this prompt; it has {kept}the rest. /clear starts afresh."
                )
            )
        self.say("")
        view = AnswerView(self.stream, self.style, terminal_size)
        content, reasoning, stopped = "", "", False
        with Interrupt() as interrupt, quiet_keyboard(), hidden_cursor(self.stream):
            view.waiting(fitted.tokens)
            reply = self.speaker.reply(fitted.turns, self.retries)
            try:
                for piece in reply:
                    if piece.kind == "reasoning":
                        reasoning += piece.text
                    else:
                        content += piece.text
                    view.push(piece)
                    if interrupt.asked:
                        stopped = True
                        break
            except KeyboardInterrupt:
                stopped = True
            finally:
                reply.close()
                outcome = reply.outcome
                view.finish([summary(outcome, self.speaker.limit, stopped)])
        self.say("")
        if stopped and not content:
            raise RequestError("stopped before the first word; the question is not kept (press Up to have it again)")
        cut = stopped or outcome.finish_reason == "length"
        self.outcomes.append(outcome)
        self.turns.append(Turn(role="assistant", content=content, reasoning=reasoning, interrupted=cut))

    def say(self, *lines: str) -> None:
        """Print lines of ours."""
        print(*lines, sep="\n", file=self.stream, flush=True)


def terminal_size() -> tuple[int, int]:
    """Columns and lines of the terminal."""
    size = shutil.get_terminal_size()
    return size.columns, size.lines


def input_line(environment: Environment, style: Style) -> "PromptSession[str]":
    """The prompt: Enter sends, Alt-Enter or a backslash before Enter breaks the line, pasted line ends stay, history is kept on disk."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import ANSI
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.styles import Style as Colours

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History
    path = environment.cache_dir / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(str(path))
    except OSError as error:
        print(style.warning(f"the input history is not kept: cannot write {path}: {error.strerror}"))
        history = InMemoryHistory()
    return PromptSession(
        message=ANSI(style.accent("› ")),
        prompt_continuation="  ",
        multiline=True,
        history=history,
        key_bindings=keys,
        completer=completer(),
        complete_while_typing=True,
        reserve_space_for_menu=4,
        style=Colours.from_dict({"completion-menu": "bg:default", "completion-menu.completion.current": "reverse"}),
        erase_when_done=False,
    )


def completer() -> "Completer":
    """Completes commands at the start of the input, and file names after /save and /load."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class SlashCompleter(Completer):
        """Offers commands and paths; silent in ordinary text."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            word, space, argument = text.partition(" ")
            if not text.startswith("/") or "\n" in text:
                return
            if not space:
                for name, entry in COMMANDS.items():
                    if name.startswith(word):
                        yield Completion(name, start_position=-len(word), display_meta=entry.does)
            elif word in ("/save", "/save!", "/load", "/image", "/video"):
                yield from PathCompleter(expanduser=True).get_completions(Document(argument), complete_event)

    return SlashCompleter()


def _help(session: Session, argument: str) -> None:
    width = max(len(f"{word} {entry.takes}") for word, entry in COMMANDS.items())
    rows = [f"  {f'{word} {entry.takes}':<{width}}   {session.style.dim(entry.does)}" for word, entry in COMMANDS.items()]
    keys = [
        ("Enter", "send"),
        ("Alt-Enter", "break the line; a \\ before Enter does too"),
        ("Ctrl-C", "stop the answer; empty the line; twice on an empty line: leave"),
        ("Ctrl-D", "leave"),
    ]
    session.say("", *rows, "", *(f"  {key:<{width}}   {session.style.dim(does)}" for key, does in keys), "")


def _save(session: Session, argument: str, overwrite: bool = False) -> None:
    if not argument:
        raise ConfigError("/save needs a file name, such as `/save chat.json`, or `/save chat.md` to read it elsewhere")
    path = Path(argument)
    save(path, session.speaker.name, session.turns, overwrite or path in session.written)
    session.written.add(path)
    session.say(session.style.dim(f"Saved {len(session.turns)} messages to {clean(argument)}."), "")


def _load(session: Session, argument: str) -> None:
    if not argument:
        raise ConfigError("/load needs the name of a file that /save has written, such as `/load chat.json`")
    session.turns = load(Path(argument))
    session.written.add(Path(argument))
    for turn in session.turns[-2:]:
        _show(session, turn)
    session.say(session.style.dim(f"Loaded {len(session.turns)} messages; the last ones stand above."), "")


def _show(session: Session, turn: Turn) -> None:
    for name in turn.images + turn.videos:
        session.say(session.style.dim(clean(f"[{name}]")))
    text = clean(turn.content)
    if turn.role == "assistant":
        view = MarkdownLines(color=session.style.color)
        view.push(text)
        session.say("", *view.lines(terminal_size()[0]), "")
    else:
        session.say(session.style.accent("› ") + text.replace("\n", "\n  "))


def _picture(kind: str) -> Callable[[Session, str], None]:
    def show(session: Session, argument: str) -> None:
        if not argument:
            raise ConfigError(f"/{kind} needs the name of a file")
        session.show(kind, argument)

    return show


def _system(session: Session, argument: str) -> None:
    has = bool(session.turns) and session.turns[0].role == "system"
    if not argument:
        session.say(session.style.dim(f"System message: {clean(session.turns[0].content)}" if has else "There is no system message."), "")
        return
    session.turns[: int(has)] = [Turn(role="system", content=argument)]
    session.say(session.style.dim("The system message is set; the conversation goes on under it."), "")


def _retry(session: Session, argument: str) -> None:
    if not session.turns or session.turns[-1].role == "system":
        raise RequestError("there is no answer to try again; ask something first")
    old = session.turns.pop() if session.turns[-1].role == "assistant" else None
    session.retries += 1
    try:
        session.answer()
    except ErnieError:
        if old is not None:
            session.turns.append(old)
        raise


def _clear(session: Session, argument: str) -> None:
    session.turns = [turn for turn in session.turns[:1] if turn.role == "system"]
    session.say(session.style.dim("The conversation is empty" + (", but for the system message." if session.turns else ".")), "")


def _reasoning(session: Session, argument: str) -> None:
    last = next((turn for turn in reversed(session.turns) if turn.role == "assistant"), None)
    if last is None or not last.reasoning.strip():
        raise RequestError("the last answer came without reasoning")
    session.say("", *(session.style.dim(line) for line in clean(last.reasoning).strip().split("\n")), "")


def _stats(session: Session, argument: str) -> None:
    outcomes = session.outcomes
    tokens = sum(outcome.answer_tokens for outcome in outcomes)
    seconds = sum(outcome.total_s for outcome in outcomes)
    rows = {
        "model": session.speaker.name,
        **session.speaker.settings(),
        "messages": f"{len(session.turns)}",
        "context": f"{session.speaker.count(session.turns) if session.turns else 0:,} of {session.speaker.limit:,} tokens",
        "answered": f"{len(outcomes)} times, {tokens:,} tokens in {seconds:.1f} s",
    }
    width = max(map(len, rows))
    session.say("", *(f"  {session.style.dim(f'{name:<{width}}')}   {clean(value)}" for name, value in rows.items()), "")


def _exit(session: Session, argument: str) -> None:
    session.leaving = True


COMMANDS: dict[str, Command] = {
    "/help": Command("", "show this", _help),
    "/save": Command("FILE", "write the conversation; .md to read, else JSON", _save),
    "/save!": Command("FILE", "the same, replacing a file", lambda session, argument: _save(session, argument, overwrite=True)),
    "/load": Command("FILE", "go on with a saved conversation", _load),
    "/image": Command("FILE", "show the model an image, with the next message", _picture("image")),
    "/video": Command("FILE", "show the model a video, with the next message", _picture("video")),
    "/system": Command("[TEXT]", "show or set the system message", _system),
    "/retry": Command("", "answer the last question again", _retry),
    "/reasoning": Command("", "show the thinking behind the last answer", _reasoning),
    "/clear": Command("", "forget the conversation, keep the system message", _clear),
    "/stats": Command("", "settings, speed and context used", _stats),
    "/exit": Command("", "leave", _exit),
}

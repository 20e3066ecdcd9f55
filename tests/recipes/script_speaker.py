"""A speaker that needs no model: it answers with a script, one word a step, and counts words as tokens."""

import re
import time
from collections.abc import Iterator, Sequence

from ernie45.recipes.answer import Outcome, Piece
from ernie45.recipes.conversation import Turn


class ScriptReply:
    """A reply that gives its pieces one by one, with a pause before each."""

    def __init__(self, pieces: Sequence[Piece], prompt_tokens: int, pause: float) -> None:
        self._pieces, self._prompt_tokens, self._pause = pieces, prompt_tokens, pause
        self.given = 0
        self.closed = False

    def __iter__(self) -> Iterator[Piece]:
        for piece in self._pieces:
            time.sleep(self._pause)
            self.given += 1
            yield piece

    def close(self) -> None:
        self.closed = True

    @property
    def outcome(self) -> Outcome:
        finished = self.given == len(self._pieces)
        return Outcome(
            prompt_tokens=self._prompt_tokens,
            answer_tokens=self.given,
            finish_reason="stop" if finished else "cancelled",
            first_token_s=0.01 if self.given else None,
            total_s=0.01 + 0.1 * self.given,
        )


class ScriptSpeaker:
    """Answers every question with `script`."""

    def __init__(self, script: str, reasoning: str = "", limit: int = 1000, pause: float = 0.0) -> None:
        self.name = "Script in no form at all"
        self.limit = limit
        self.asked: list[tuple[Turn, ...]] = []
        self.replies: list[ScriptReply] = []
        self._pieces = [Piece("reasoning", w) for w in re.findall(r"\s*\S+\s*$|\s*\S+", reasoning)]
        self._pieces += [Piece("content", w) for w in re.findall(r"\s*\S+\s*$|\s*\S+", script)]
        self._pause = pause

    def count(self, turns: Sequence[Turn]) -> int:
        return sum(len(turn.content.split()) for turn in turns)

    def reply(self, turns: Sequence[Turn], retry: int = 0) -> ScriptReply:
        self.asked.append(tuple(turns))
        self.replies.append(ScriptReply(self._pieces, self.count(turns), self._pause))
        return self.replies[-1]

    def settings(self) -> dict[str, str]:
        return {"compute type": "none"}

"""The course: every step from packages to a served chat, in order; what is done is not done again.

A step leaves a mark that appears whole or not at all (a folder that is renamed, a file that is replaced), so that a run that was killed
goes on where it was; the training commands go on from their own checkpoints.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ernie45.errors import DataError, RunError
from ernie45.train.lock import locked
from ernie45.weights.safetensors_write import check_room
from story.blank import write_blank
from story.children import Command, run_ernie
from story.exam import sit
from story.packages import fetch
from story.rows import Amounts, write_rows
from story.served import ask_the_server

RUNS = Path(__file__).parents[1] / "runs" / "story"
ROOM = 3_000_000_000
"""Bytes that the whole story takes on the disk: pictures, checkpoints, a model after each step."""
STAGES = ("text", "vision", "joint", "sft", "dpo")
"""What is trained, in order; each begins with the model before it."""
CHATS = frozenset({"sft", "dpo", "packed"})


@dataclass(frozen=True)
class Plan:
    """What is asked for. out: the story's folder; scale: share of the whole story's pictures and steps; quick: forms alone, no packages."""

    out: Path
    packages: Path
    scale: float = 1.0
    quick: bool = False
    workers: int = 2

    @cached_property
    def amounts(self) -> Amounts:
        """How much data."""
        return Amounts.scaled(self.scale)


@dataclass(frozen=True)
class Step:
    """One step: its name, its mark, and the work that makes the mark."""

    name: str
    mark: Path
    work: Callable[[], None]


class Course:
    """The steps of one plan. `run` does what is left of them."""

    def __init__(self, plan: Plan, say: Callable[[str], None], command: Command = run_ernie) -> None:
        """say: hears what is done; command: runs the commands of ernie, each in a process of its own."""
        self.plan, self.out, self.say, self.command = plan, plan.out.resolve(), say, command
        self.data = self.out / "data"

    def run(self) -> None:
        """Do every step that has no mark yet. Raises DataError, RunError or CheckpointError, and goes on from there next time."""
        with locked(self.out):
            self._same_plan()
            check_room(self.out, int(ROOM * max(self.plan.scale, 0.02)))
            steps = list(self.steps())
            for number, step in enumerate(steps, 1):
                if step.mark.exists():
                    self.say(f"[{number}/{len(steps)}] {step.name}: done before")
                    continue
                self.say(f"[{number}/{len(steps)}] {step.name}")
                start = time.perf_counter()
                step.work()
                assert step.mark.exists(), f"{step.name} left no {step.mark}"
                self._took(step.name, time.perf_counter() - start)

    def steps(self) -> Iterator[Step]:
        """All of them, in order."""
        yield Step("data: texts, pictures, questions", self.data / "facts.json", self._make_data)
        yield Step("tokenizer and random weights", self.out / "blank.json", self._make_blank)
        for name in ("learned", "held-out"):
            yield Step(f"corpus of the {name} texts", self.out / "corpus" / f"{name}.json", lambda name=name: self._corpus(name))
        yield self._exam("blank", self.out / "blank")
        for number, stage in enumerate(STAGES, 1):
            yield Step(f"training, {stage}", self.model(stage) / "config.json", lambda n=number, s=stage: self._train(n, s))
            yield self._exam(stage, self.model(stage))
        yield Step("4 bits", self.model("packed") / "config.json", self._quantise)
        yield self._exam("packed", self.model("packed"))
        yield Step("a question to the server", self.out / "served.json", self._serve)

    def model(self, stage: str) -> Path:
        """The folder of a stage's model."""
        return self.out / "packed" if stage == "packed" else self.out / stage / "model"

    def _same_plan(self) -> None:
        """A folder holds one story: another scale has other data."""
        asked = {"scale": self.plan.scale, "quick": self.plan.quick}
        file = self.out / "plan.json"
        if not file.exists():
            replace_file(file, asked)
        found = json.loads(file.read_text("utf-8"))
        if found != asked:
            raise RunError(f"{self.out}: holds a story with {found}, asked for is {asked}; choose another --out, or remove the folder")

    def _took(self, name: str, seconds: float) -> None:
        file = self.out / "seconds.json"
        known = json.loads(file.read_text("utf-8")) if file.exists() else {}
        replace_file(file, known | {name: round(known.get(name, 0) + seconds, 1)})
        self.say(f"      {seconds:,.0f} s")

    def _make_data(self) -> None:
        partial = self.out / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        folders = None if self.plan.quick else fetch(self.plan.packages.resolve(), self.say)
        try:
            facts = write_rows(partial, self.plan.amounts, folders, self.plan.workers, self.say)
        except OSError as error:
            raise DataError(f"{partial}: cannot be written: {error.strerror or error}; what was done before is kept") from error
        replace_file(partial / "facts.json", facts)
        shutil.rmtree(self.data, ignore_errors=True)
        partial.rename(self.data)

    def _make_blank(self) -> None:
        shutil.rmtree(self.out / "blank", ignore_errors=True)
        parts = write_blank(self.out / "blank", self._words(), small=self.plan.quick)
        replace_file(self.out / "blank.json", parts)

    def _words(self) -> Iterator[str]:
        """Every text that the tokenizer should know the words of."""
        for name in ("texts/learned", "captions", "questions", "talk"):
            for line in (self.data / f"{name}.jsonl").read_text("utf-8").splitlines():
                row = json.loads(line)
                yield from _texts_of(row)

    def _corpus(self, name: str) -> None:
        source = self.data / "texts" / f"{name}.jsonl"
        self._ernie("pretrain", "blank", "--data", source, "--prepare", self.out / "corpus" / name, "--out", "unused")

    def _train(self, number: int, stage: str) -> None:
        word = {"sft": "sft", "dpo": "align"}.get(stage, "pretrain")
        file = RUNS / f"{number}-{stage}.yaml"
        settings = yaml.safe_load(file.read_text("utf-8"))
        steps = max(3, round(int(settings["steps"]) * self.plan.scale))
        options: list[object] = ["--steps", steps, "--schedule.warmup", min(settings["schedule"]["warmup"], steps // 4)]
        if self.plan.quick:
            options += ["--save-every", 1000, *(() if stage == "dpo" else ("--eval-every", max(1, steps // 4)))]
        self._ernie(word, "--config", file, *options)

    def _quantise(self) -> None:
        self._ernie("quantize", "--config", RUNS / "6-quantize.yaml")

    def _exam(self, stage: str, model: Path) -> Step:
        mark = self.out / "exam" / f"{stage}.json"

        def work() -> None:
            result = sit(model, self.data, self.out / "corpus" / "held-out", chats=stage in CHATS, blind=stage == "packed")
            mark.parent.mkdir(exist_ok=True)
            replace_file(mark, result)
            right, of = (sum(group[part] for group in result["groups"].values()) for part in ("right", "of"))
            self.say(f"      perplexity {result['perplexity']:.1f}, {right} of {of} answers right")

        return Step(f"exam after {stage}", mark, work)

    def _serve(self) -> None:
        replace_file(self.out / "served.json", ask_the_server(self.model("packed"), self.data, self.out / "logs"))

    def _ernie(self, *words: object) -> None:
        """Run a command of ernie in the story's folder; what it says goes on to us. Raises RunError."""
        self.say(f"      $ ernie {' '.join(os.path.relpath(w, self.out) if isinstance(w, Path) else str(w) for w in words)}")
        tail: list[str] = []

        def hear(line: str) -> None:
            tail.append(line.strip())
            self.say(f"      {line.rstrip()}")

        code = self.command(list(map(str, words)), self.out, hear)
        if code:
            raise RunError(f"`ernie {words[0]}` ended with {code}: {' | '.join(tail[-2:])}; what was done before is kept")


def _texts_of(row: Any) -> Iterator[str]:
    """Every text inside a row but addresses."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, list):
        for part in row:
            yield from _texts_of(part)
    elif isinstance(row, dict):
        for key, part in row.items():
            if key not in ("image_info", "image_url", "role", "type", "tag"):
                yield from _texts_of(part)


def replace_file(path: Path, content: Any) -> None:
    """Write JSON whole or not at all. Raises RunError when the disk refuses."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}; what was done before is kept") from error

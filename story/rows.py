"""Training rows and exam papers, written as files that the commands read: texts, captions, conversations, pairs.

texts/learned.jsonl, texts/held-out.jsonl   {"text"}
pictures/00000.png ...                      what the rows show
captions.jsonl                              {"image_info", "text_info"}: a picture, then what it shows
captions-held-out.jsonl                     the same of pictures that nothing is learned from
questions.jsonl                             {"messages"}: questions about a picture, some answered after thinking
talk.jsonl                                  {"messages"}: words and sums, without pictures
pairs.jsonl                                 {"prompt", "chosen", "rejected", "images"}: the right answer and a wrong one
exam/00000.png ..., exam.json               pictures and questions that are kept from all of these
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from story.drawings import Drawings
from story.packages import PACKAGES
from story.questions import Question, ask, caption
from story.scenes import KINDS, Kind, Scene, Scenes
from story.texts import built_in, definitions, from_wordnet, plain_facts
from story.words import COUNTRIES, KEPT_COUNTRIES, THINGS, article, verb

QUICK_KINDS: tuple[Kind, ...] = ("form", "count")
_CHUNK = 250  # pictures that one process draws at a time
_THINKS = 0.3  # share of the conversations that end with an answer after thinking
_TURNS = 3  # questions of one conversation
_HELD_CAPTIONS = 150
_SUMS = tuple((one, two) for one in range(10) for two in range(10) if (one * 7 + two * 3) % 8)  # every eighth sum is kept from all rows
_TOGETHER = 8  # captions of one text without pictures
_BLIND = 4  # one in so many captions is also learned as text, so that the language model knows how captions go


@dataclass(frozen=True)
class Amounts:
    """How much is made: pictures, pairs, and exam questions of each sort."""

    pictures: int
    pairs: int
    exam: int

    @classmethod
    def scaled(cls, scale: float) -> "Amounts":
        """Those of the whole story, times `scale`."""
        return cls(*(max(8, round(scale * whole)) for whole in (20_000, 1_200, 40)))


def write_rows(out: Path, amounts: Amounts, folders: dict[str, Path] | None, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Write everything into `out` and return what there is of it. folders: of the packages; None makes a world of forms alone."""
    texts = from_wordnet(folders["wordnet"]) if folders else built_in()
    kinds = KINDS if folders else QUICK_KINDS
    drawings = Drawings(folders) if folders else None
    maker, dice = Scenes(1, kinds), random.Random(3)
    scenes = [maker.learned() for _ in range(amounts.pictures)]
    held = [maker.learned() for _ in range(min(_HELD_CAPTIONS, amounts.pictures))]
    said = [caption(scene, drawings, dice) for scene in scenes + held]
    blind = (" ".join(said[start : start + _TOGETHER]) for start in range(0, len(scenes), _BLIND * _TOGETHER))
    _write(out / "texts" / "learned.jsonl", ({"text": text} for text in [*texts.learned, *(plain_facts() if folders else ()), *blind]))
    _write(out / "texts" / "held-out.jsonl", ({"text": text} for text in texts.held_out))
    for name, documents in (("learned", texts.learned[:400]), ("held-out", texts.held_out)):  # for `ernie quantize`, which reads plain text
        (out / "texts" / f"{name}.txt").write_text("\n\n".join(documents), "utf-8")
    say(f"texts: {len(texts.learned):,} documents and {len(texts.held_out):,} held out, {texts.origin}")
    draw_all(scenes + held, out / "pictures", folders, workers, say)
    names = [f"pictures/{number:05}.png" for number in range(len(scenes) + len(held))]
    captions = [_caption_row(name, text) for name, text in zip(names, said, strict=True)]
    _write(out / "captions.jsonl", captions[: len(scenes)])
    _write(out / "captions-held-out.jsonl", captions[len(scenes) :])
    _write(out / "questions.jsonl", (_conversation(name, ask(s, drawings, dice), dice) for name, s in zip(names, scenes, strict=False)))
    _write(out / "talk.jsonl", _talk(folders, dice))
    _write(out / "pairs.jsonl", _pairs(list(zip(names, scenes, strict=False)), drawings, dice, amounts.pairs))
    _write(out / "word-pairs.jsonl", _word_pairs(dice))
    papers = exam_papers(amounts.exam, kinds, drawings)
    draw_all([scene for scene, _, _ in papers], out / "exam", folders, workers, say)
    entries = [{"group": group, "picture": f"exam/{number:05}.png", **vars(question)} for number, (_, group, question) in enumerate(papers)]
    (out / "exam.json").write_text(json.dumps(entries, indent=1) + "\n", "utf-8")
    return {
        "pictures": len(scenes),
        "exam": len(entries),
        "text": texts.origin,
        "packages": [vars(PACKAGES[key]) for key in folders] if folders else [],
    }


def _write(path: Path, rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def draw_all(scenes: Sequence[Scene], folder: Path, folders: dict[str, Path] | None, workers: int, say: Callable[[str], None]) -> None:
    """Draw every scene as a numbered PNG, by several processes."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [(start, scenes[start : start + _CHUNK]) for start in range(0, len(scenes), _CHUNK)]
    draw = partial(_draw_chunk, folder=folder, folders=folders)
    if workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            draw(chunk)
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for number, _ in enumerate(pool.map(draw, chunks), 1):
                if number % 16 == 0:
                    say(f"{number * _CHUNK:,} of {len(scenes):,} pictures")
    say(f"{len(scenes):,} pictures in {folder.name}/")


_DRAWINGS: dict[str, Drawings] = {}


def _draw_chunk(chunk: tuple[int, Sequence[Scene]], folder: Path, folders: dict[str, Path] | None) -> None:
    if folders and "all" not in _DRAWINGS:
        _DRAWINGS["all"] = Drawings(folders)
    start, scenes = chunk
    for number, scene in enumerate(scenes, start):
        scene.draw(_DRAWINGS.get("all")).save(folder / f"{number:05}.png", compress_level=1)


def _caption_row(picture: str, text: str) -> dict[str, Any]:
    return {"image_info": [{"matched_text_index": 0, "image_url": picture}], "text_info": [{"text": text, "tag": "no_mask"}]}


def _conversation(picture: str, questions: list[Question], dice: random.Random) -> dict[str, Any]:
    """Some of the questions in any order; an answer after thinking stands last, where the format shows the reasoning."""
    if questions[0].thought and dice.random() < _THINKS:
        asked = [*dice.sample(questions[1:], min(1, len(questions) - 1)), questions[0]]
        return {"messages": _messages(asked, picture, thinks=True)}
    asked = dice.sample(questions, min(_TURNS, len(questions)))
    if questions[0] not in asked:  # the most telling one is always among them
        asked[dice.randrange(len(asked))] = questions[0]
    return {"messages": _messages(asked, picture, thinks=False)}


def _messages(questions: Sequence[Question], picture: str, *, thinks: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        shown = [{"type": "image_url", "image_url": {"url": picture}}] if number == 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": question.answer})
    if thinks:
        messages[-1]["reasoning_content"] = questions[-1].thought
    return messages


def _pairs(shown: list[tuple[str, Scene]], drawings: Drawings | None, dice: random.Random, count: int) -> Iterator[dict[str, Any]]:
    for picture, scene in dice.sample(shown, min(count, len(shown))):
        question = dice.choice(ask(scene, drawings, dice)[:2])
        yield {
            "prompt": _messages([question], picture, thinks=False)[:1],
            "chosen": question.answer,
            "rejected": question.wrong,
        }


def _word_pairs(dice: random.Random) -> Iterator[dict[str, Any]]:
    """Right and wrong answers to questions without a picture: kinds of things, and sums."""
    kinds = sorted({kind for _, kind in THINGS.values()})
    for name, (_, kind) in THINGS.items():
        right, wrong = (
            f"{article(name).capitalize()} {verb(name)} {article(k)}." for k in (kind, dice.choice([k for k in kinds if k != kind]))
        )
        yield {"prompt": f"What is {article(name)}?", "chosen": right, "rejected": wrong}
    for one, two in _SUMS:
        wrong_sum = one + two + dice.choice((-2, -1, 1, 2))
        right, wrong = (f"{one} plus {two} is {total}." for total in (one + two, wrong_sum))
        yield {"prompt": f"What is {one} plus {two}?", "chosen": right, "rejected": wrong}


def _talk(folders: dict[str, Path] | None, dice: random.Random) -> Iterator[dict[str, Any]]:
    """Questions without a picture: what things are, sums that are thought through, and who is speaking."""

    def row(asked: str, said: str, thought: str = "") -> dict[str, Any]:
        answer = {"role": "assistant", "content": said} | ({"reasoning_content": thought} if thought else {})
        return {"messages": [{"role": "user", "content": asked}, answer]}

    who = "I am a small model with text and vision experts, trained from nothing by ernie45."
    for asked in ("Who are you?", "What are you?", "Hello!", "Hi, who is there?", "What is your name?", "Are you ERNIE?"):
        yield row(asked, f"{'No. ' if 'ERNIE' in asked else ''}{'Hello! ' if asked[0] == 'H' else ''}{who}")
    for name, (_, kind) in THINGS.items():
        yield row(f"What is {article(name)}?", f"{article(name).capitalize()} {verb(name)} {article(kind)}.")
    for name, text in (definitions(folders["wordnet"]) if folders else {}).items():
        yield row(f"Explain the word {name}.", f"{name.capitalize()}: {text}.")
    for one, two in _SUMS:
        steps = ", ".join(str(one + n) for n in range(1, two + 1)) or str(one)
        thought = f"I begin at {one} and go on {two} times: {steps}."
        yield row(f"What is {one} plus {two}?", f"{one} plus {two} is {one + two}.", thought if dice.random() < 0.5 else "")


def exam_papers(count: int, kinds: Sequence[Kind], drawings: Drawings | None) -> list[tuple[Scene, str, Question]]:
    """Scene, group and question of the exam: `count` of each group."""
    maker, dice = Scenes(4), random.Random(5)
    papers: list[tuple[Scene, str, Question]] = []

    def add(group: str, scene: Scene, number: int) -> None:
        papers.append((scene, group, ask(scene, drawings, dice)[number]))

    for turn in range(count):
        add("colour of a form", maker.made("form", kept=True), 2)
        add("colour of the background", maker.made("form", kept=True), 3)
        add("form and colour, never together before", maker.made("form", kept=True), 0)
        if "count" in kinds:
            add("how many", maker.made("count", kept=True), 0)
        if "pair" in kinds:
            add("where", maker.made("pair", kept=True), 0)
        if "thing" in kinds:
            name = list(THINGS)[turn * 7 % len(THINGS)]
            add("thing, known drawing", maker.made("thing", kept=True, subject=name, familiar=True), 0)
            add("thing, drawn by others", maker.made("thing", kept=True, subject=name), 0)
            add("kind of thing, drawn by others", maker.made("thing", kept=True, subject=name), 1)
        if "flag" in kinds:
            add("flag, known drawing", maker.made("flag", kept=True, familiar=True), 0)
            add("flag, drawn by others", maker.made("flag", kept=True, subject=list(COUNTRIES)[turn * 5 % len(COUNTRIES)]), 0)
            unseen = list(KEPT_COUNTRIES)[turn % len(KEPT_COUNTRIES)]
            add("colours of an unseen flag", maker.made("flag", kept=True, subject=unseen), 0)
    return papers

"""The exam: how well a model continues text it has not seen, and what it says about pictures it has not seen.

A model that does not chat yet is asked to go on after the picture, as its captions do; a model that chats is asked the questions. An answer
is right when it holds the words of the right one and no other word of their kind (`questions.Question.is_right`).
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ernie45.config import Environment
from ernie45.engine.client import LLM
from ernie45.engine.request import SamplingParams
from ernie45.models.load import load
from ernie45.nn.attention import PackedCausal
from ernie45.tokens.messages import Image
from ernie45.tokens.sight import PictureReader
from ernie45.tokens.template import IGNORED
from ernie45.train.shards import open_corpus
from ernie45.train.stream import Source, Stream
from story.questions import Question

_WINDOW = 512
_WINDOWS = 40
_THINKS = 6  # every so many questions are asked again with thinking switched on
_AT_ONCE = 32
_GREEDY = SamplingParams(temperature=0, max_tokens=32)
_AFTER_THINKING = SamplingParams(temperature=0, max_tokens=90)
SPEAKS_OF = "The background"  # how a caption's last sentence begins


@dataclass(frozen=True)
class Paper:
    """One question of the exam, and the picture it is about."""

    group: str
    picture: Path
    question: Question


def read_papers(data: Path) -> list[Paper]:
    """The exam that `rows.write_rows` wrote."""
    entries = json.loads((data / "exam.json").read_text("utf-8"))
    return [Paper(entry.pop("group"), data / entry.pop("picture"), _question(entry)) for entry in entries]


def _question(entry: dict[str, Any]) -> Question:
    return Question(**entry | {"key": tuple(entry["key"]), "choices": tuple(map(tuple, entry["choices"]))})


def chance(papers: Sequence[Paper]) -> float:
    """What always giving the most frequent right answer would score."""
    return Counter(paper.question.key for paper in papers).most_common(1)[0][1] / len(papers)


@torch.inference_mode()
def perplexity(model: Path, corpus: Path) -> float:
    """exp of the mean loss per token on windows of held-out text; packed models have no head to train with, so whole logits are made."""
    decoder = load(model, environment=Environment.read()).decoder.eval()
    source = Source("held-out", open_corpus(corpus))
    stream, loss, learned = Stream([source], _WINDOW, 0), 0.0, 0
    for number in range(max(1, min(_WINDOWS, source.corpus.facts.tokens // _WINDOW))):
        batch = stream.batch(number)
        h_TD = decoder(decoder.embed(batch.tokens_T), batch.positions_T, PackedCausal(list(batch.doc_ends)))
        loss += cross_entropy(decoder.logits(h_TD).float(), batch.labels_T, ignore_index=IGNORED, reduction="sum").item()
        learned += batch.learned
    return math.exp(loss / learned)


def sit(model: Path, data: Path, corpus: Path, *, chats: bool, blind: bool = False) -> dict[str, Any]:
    """Let a model sit the exam: perplexity, and by group right answers, number and chance; every answer is kept.

    chats: whether it is asked questions or goes on after the picture. blind: also shows each question another picture of its group, which
    tells how much of the score comes from looking.
    """
    papers = read_papers(data)
    llm = LLM(model, num_pages=1024, max_running=_AT_ONCE)
    result: dict[str, Any] = {"perplexity": perplexity(model, corpus), "said": [], "groups": {}}
    said = _answers(llm, papers, [paper.picture for paper in papers]) if chats else _captions(llm, papers)
    result["groups"] = _marks(papers, said)
    result["said"] = [{"picture": paper.picture.name, "group": paper.group, "said": text} for paper, text in zip(papers, said, strict=True)]
    if chats:
        chosen = [paper for paper in papers if paper.question.thought][::_THINKS] or papers[:1]
        result["thinking"] = _marks(chosen, _answers(llm, chosen, [paper.picture for paper in chosen], thinking=True))
        result["not thinking"] = _marks(chosen, [text for paper, text in zip(papers, said, strict=True) if paper in chosen])
    if blind:
        result["another picture"] = _marks(papers, _answers(llm, papers, _exchanged(papers)))
    return result


def _marks(papers: Sequence[Paper], said: Sequence[str]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[tuple[Paper, bool]]] = {}
    for paper, text in zip(papers, said, strict=True):
        groups.setdefault(paper.group, []).append((paper, paper.question.is_right(text)))
    return {
        group: {"right": sum(right for _, right in marks), "of": len(marks), "chance": chance([paper for paper, _ in marks])}
        for group, marks in groups.items()
    }


def _exchanged(papers: Sequence[Paper]) -> list[Path]:
    """For each question the picture of the next one of its group."""
    groups: dict[str, list[Paper]] = {}
    for paper in papers:
        groups.setdefault(paper.group, []).append(paper)
    following = {paper.picture: group[(number + 1) % len(group)].picture for group in groups.values() for number, paper in enumerate(group)}
    return [following[paper.picture] for paper in papers]


def _answers(llm: LLM, papers: Sequence[Paper], pictures: Sequence[Path], *, thinking: bool = False) -> list[str]:
    """What a chatting model answers."""
    said: list[str] = []
    params = _AFTER_THINKING if thinking else _GREEDY
    for start in range(0, len(papers), _AT_ONCE):
        together = slice(start, start + _AT_ONCE)
        streams = [
            llm.stream(_shown(picture, paper.question.text), params, thinking=thinking)
            for paper, picture in zip(papers[together], pictures[together], strict=True)
        ]
        for stream in streams:
            with stream:
                for _ in stream.steps():
                    pass
                said.append(stream.completion.text)
    return said


def _shown(picture: Path, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": str(picture)}, {"type": "text", "text": text}]}]


def _captions(llm: LLM, papers: Sequence[Paper]) -> list[str]:
    """How a model that does not chat goes on after the picture: the caption's sentence that the question is about."""
    reader = llm.sight
    assert isinstance(reader, PictureReader), "the story's models see"
    pictures = [[reader.image(Image(source=str(paper.picture)))] for paper in papers]
    done = llm.generate(["Picture 1:<|image@placeholder|>"] * len(papers), _GREEDY, pictures=pictures)
    said = [completion.text.partition(SPEAKS_OF) for completion in done]
    return [text[2] if paper.question.skill == "background" else text[0] for paper, text in zip(papers, said, strict=True)]

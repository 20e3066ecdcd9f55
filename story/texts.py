"""English to learn from: definitions and examples out of WordNet, and Python's help topics where nothing is fetched."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ernie45.errors import DataError
from ernie45.recipes.texts import built_in_text
from story.words import COUNTRIES, THINGS, article, verb

_KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_SYNSET = re.compile(r"^\d{8} \d\d [nvasr] ([0-9a-f]{2}) (.*?) \| (.*)$")
_HELD_OUT = 40  # one document in so many
_TOGETHER = 12  # synsets of one document


@dataclass(frozen=True)
class Texts:
    """Documents to learn from, and documents that are only measured on."""

    learned: list[str]
    held_out: list[str]
    origin: str


def from_wordnet(folder: Path) -> Texts:
    """Every definition with its words and examples, neighbours together. Raises DataError when the files are not WordNet's."""
    documents = []
    for file, kind in _KINDS.items():
        entries = list(_entries(folder / "dict" / f"data.{file}", kind))
        documents += ["\n".join(entries[start : start + _TOGETHER]) for start in range(0, len(entries), _TOGETHER)]
    return _split(documents, "WordNet's definitions and examples")


def _entries(path: Path, kind: str) -> Iterator[str]:
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; remove its folder, and it is fetched again") from None
    for line in lines:
        if line.startswith("  "):  # the licence
            continue
        match = _SYNSET.match(line)
        if match is None:
            raise DataError(f"{path}: a line is no entry of WordNet: {line:.60}")
        count, rest, gloss = match.groups()
        words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest.split()[: 2 * int(count, 16) : 2]]
        yield f"{', '.join(words)} ({kind}): {gloss.strip()}."


def built_in() -> Texts:
    """Python's help topics: what a quick run learns from, since every Python carries them."""
    learned, held_out = (built_in_text(held_out=kept) for kept in (False, True))
    return Texts(learned.text.split("\n\n\n"), held_out.text.split("\n\n\n")[:20], "Python's help topics")


def _split(documents: list[str], origin: str) -> Texts:
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    held = set(order[:: max(2, min(_HELD_OUT, len(order) // 4))])
    return Texts([documents[n] for n in order if n not in held], [documents[n] for n in order if n in held], origin)


def definitions(folder: Path) -> dict[str, str]:
    """What WordNet says a thing is: the sense that it lists among animals, plants, food or artefacts; things without one are left out."""
    index = {line.split(" ", 1)[0]: line for line in (folder / "dict" / "index.noun").read_text("utf-8").splitlines() if line[:1] != " "}
    lines = {line[:8]: line for line in (folder / "dict" / "data.noun").read_text("utf-8").splitlines() if line[:1] != " "}
    fields = {"animal": ("05",), "plant": ("20",), "fruit": ("13", "20"), "vegetable": ("13", "20"), "food": ("13",)}
    found = {}
    for name, (_, kind) in THINGS.items():
        entry = index.get(name.replace(" ", "_"), "").split()
        senses = [lines[offset] for offset in entry if offset in lines]
        wanted = [line for line in senses if line[9:11] in fields.get(kind, ("06",))]
        if wanted:
            found[name] = re.split(r"[;:(]", wanted[0].partition(" | ")[2])[0].strip()
    return found


def plain_facts() -> list[str]:
    """Short sentences about the story's own world, so that the text model knows its words before it sees anything."""
    facts = [f"{article(name).capitalize()} {verb(name)} {article(kind)}." for name, (_, kind) in THINGS.items()]
    facts += [f"{country[0].upper()}{country[1:]} is a country, and it has a flag." for country in COUNTRIES.values()]
    dice = random.Random(0)
    return [" ".join(dice.sample(facts, 8)) for _ in range(4 * len(facts) // 8)]

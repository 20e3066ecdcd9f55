"""What a picture shows, as a value that draws itself: a form, two forms, several equal ones, a thing, or a flag.

A scene is drawn from its own random numbers, so that the same number gives the same picture. What is kept for the exam is decided here:
`learned` scenes never show it, `kept` scenes show nothing else.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from story.drawings import EXAM_STYLE, FLAG_STYLES, THING_STYLES, Drawings, form
from story.words import COLOURS, COUNTRIES, FORMS, KEPT_COUNTRIES, KEPT_PAIRS, THINGS

SIDE = 84
"""Pixels of a picture's side: six patches of 14, which the resampler joins to nine tokens."""
MOST = 5
"""The largest number of equal forms in one picture."""

Kind = Literal["form", "pair", "count", "thing", "flag"]
KINDS: tuple[Kind, ...] = ("form", "pair", "count", "thing", "flag")
PLACES = ("left", "right", "above", "below")


@dataclass(frozen=True)
class Scene:
    """What is to be seen. Of `forms` the first stands at `place` of the second; `subject` is a thing's name or a country's code."""

    kind: Kind
    seed: int
    ground: str
    forms: tuple[tuple[str, str], ...] = ()
    place: str = ""
    count: int = 1
    subject: str = ""
    style: str = ""
    kept: bool = field(default=False, compare=False)

    def draw(self, drawings: Drawings | None) -> Image.Image:
        """The picture, RGB, `SIDE` x `SIDE`. drawings: of things and flags; forms need none."""
        dice = random.Random(self.seed)
        paper = Image.new("RGB", (SIDE, SIDE), _near(COLOURS[self.ground], dice))
        if self.kind in ("thing", "flag"):
            assert drawings is not None, "things and flags are drawn by others"
            self._put_subject(paper, drawings, dice)
        elif self.kind == "pair":
            self._put_pair(paper, dice)
        else:
            self._put_forms(paper, dice)
        return paper

    def _put_subject(self, paper: Image.Image, drawings: Drawings, dice: random.Random) -> None:
        draw = drawings.thing if self.kind == "thing" else drawings.flag
        subject = draw(self.style, self.subject)
        largest = dice.uniform(0.62, 0.95) * SIDE
        scale = largest / max(subject.size)
        size = (max(1, round(subject.width * scale)), max(1, round(subject.height * scale * dice.uniform(0.92, 1.08))))
        small = subject.resize(size, Image.Resampling.LANCZOS)
        if self.kind == "thing" and dice.random() < 0.5:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        small = small.rotate(dice.uniform(-14, 14), Image.Resampling.BICUBIC, expand=True)
        if max(small.size) > SIDE:
            small.thumbnail((SIDE, SIDE))
        _paste(paper, small, dice.random() * (SIDE - small.width), dice.random() * (SIDE - small.height))

    def _put_forms(self, paper: Image.Image, dice: random.Random) -> None:
        """One form anywhere, or several on a jittered grid."""
        name, colour = self.forms[0]
        rgb = _near(COLOURS[colour], dice)
        if self.count == 1 and self.kind == "form":
            size = dice.randint(44, 76)
            _paste(paper, form(name, rgb, size, dice.uniform(-6, 6)), dice.random() * (SIDE - size), dice.random() * (SIDE - size))
            return
        cell = SIDE // 3
        for place in dice.sample(range(9), self.count):
            size = dice.randint(17, 24)
            drawn = form(name, rgb, size, dice.uniform(-12, 12))
            left, top = (place % 3) * cell, (place // 3) * cell
            _paste(paper, drawn, left + dice.random() * (cell - size), top + dice.random() * (cell - size))

    def _put_pair(self, paper: Image.Image, dice: random.Random) -> None:
        half = SIDE / 2
        across = self.place in ("left", "right")
        first_low = self.place in ("left", "above")
        for number, (name, colour) in enumerate(self.forms):
            size = dice.randint(26, 38)
            drawn = form(name, _near(COLOURS[colour], dice), size, dice.uniform(-10, 10))
            along = dice.random() * (half - size) + (0 if (number == 0) == first_low else half)
            other = dice.random() * (SIDE - size)
            _paste(paper, drawn, *((along, other) if across else (other, along)))


def _paste(paper: Image.Image, drawn: Image.Image, left: float, top: float) -> None:
    paper.paste(drawn, (max(0, round(left)), max(0, round(top))), drawn)


def _near(rgb: tuple[int, int, int], dice: random.Random) -> tuple[int, int, int]:
    """A colour that still has the same name."""
    red, green, blue = (max(0, min(255, value + dice.randint(-13, 13))) for value in rgb)
    return red, green, blue


class Scenes:
    """Makes scenes. `learned` and `kept` never show the same: see `words.KEPT_PAIRS`, `words.KEPT_COUNTRIES`, `drawings.EXAM_STYLE`."""

    def __init__(self, seed: int, kinds: tuple[Kind, ...] = KINDS) -> None:
        self.dice, self.kinds = random.Random(seed), kinds
        self.weights = [{"form": 14, "pair": 2, "count": 3, "thing": 4, "flag": 4}[kind] for kind in kinds]

    def learned(self) -> Scene:
        """A scene of the training."""
        return self.made(self.dice.choices(self.kinds, self.weights)[0], kept=False)

    def made(self, kind: Kind, *, kept: bool, subject: str = "", familiar: bool = False) -> Scene:
        """A scene of a kind. kept: what only the exam shows; familiar: with `kept`, a known drawing in a picture that was not learned."""
        dice, seed = self.dice, self.dice.randrange(2**40)
        if kind == "thing":
            style = EXAM_STYLE if kept and not familiar else dice.choice(THING_STYLES)
            return Scene(kind, seed, self._ground(()), subject=subject or dice.choice(list(THINGS)), style=style, kept=kept)
        if kind == "flag":
            code = subject or dice.choice(list(COUNTRIES))
            style = EXAM_STYLE if kept and not familiar and code in COUNTRIES else dice.choice(FLAG_STYLES)
            assert kept or code not in KEPT_COUNTRIES, "an exam's flag among the learned"
            return Scene(kind, seed, dice.choice(("white", "grey", "black")), subject=code, style=style, kept=kept)
        forms = (self._form(kept), self._form(kept))
        while forms[0] == forms[1] or forms[0][0] == forms[1][0]:
            forms = (forms[0], self._form(kept))
        if kind == "pair":
            ground = self._ground(tuple(colour for _, colour in forms))
            return Scene(kind, seed, ground, forms, place=dice.choice(PLACES), count=2, kept=kept)
        count = dice.randint(1, MOST) if kind == "count" else 1
        return Scene(kind, seed, self._ground((forms[0][1],)), forms[:1], count=count, kept=kept)

    def _form(self, kept: bool) -> tuple[str, str]:
        if kept:
            return self.dice.choice(sorted(KEPT_PAIRS))
        while True:
            found = self.dice.choice(FORMS), self.dice.choice(list(COLOURS))
            if found not in KEPT_PAIRS:
                return found

    def _ground(self, without: tuple[str, ...]) -> str:
        return self.dice.choice([colour for colour in COLOURS if colour not in without])

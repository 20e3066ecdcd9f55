"""What is asked about a picture, what the right answer is, what thinking leads there, and what a wrong answer would be."""

import random
from dataclasses import dataclass

from story.drawings import Drawings
from story.scenes import MOST, PLACES, Scene
from story.words import COLOURS, COUNTRIES, FORMS, THINGS, article, listed, plural, verb

_WHERE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Question:
    """A question with its answer. `key` holds the words that an answer must have to be right; `choices` all that could stand there.

    wrong: a whole answer that is false in the same words;  thought: reasoning that leads to the answer, empty where none is worth it.
    """

    skill: str
    text: str
    answer: str
    key: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...]
    wrong: str
    thought: str = ""

    def is_right(self, said: str) -> bool:
        """Whether what was said holds every word of the key, and of the other choices nothing that it should not."""
        padded = f" {''.join(c if c.isalnum() else ' ' for c in said.lower())} ".replace("  ", " ")
        wanted = {word.lower() for word in self.key}
        others = {word.lower() for choice in self.choices for word in choice} - wanted
        return all(f" {word} " in padded for word in wanted) and not any(f" {w} " in padded for w in others if not _inside(w, wanted))


def _inside(word: str, wanted: set[str]) -> bool:
    return any(f" {word} " in f" {right} " for right in wanted)


def _names(names: object) -> tuple[tuple[str, ...], ...]:
    assert isinstance(names, tuple | list | dict)
    return tuple((str(name),) for name in names)


def ask(scene: Scene, drawings: Drawings | None, dice: random.Random) -> list[Question]:
    """Every question about a scene, the most telling first."""
    if scene.kind == "thing":
        return _about_thing(scene, dice)
    if scene.kind == "flag":
        assert drawings is not None
        return _about_flag(scene, drawings.flag_colours(scene.subject), dice)
    return {"form": _about_form, "pair": _about_pair, "count": _about_count}[scene.kind](scene, dice)


def caption(scene: Scene, drawings: Drawings | None, dice: random.Random) -> str:
    """What a pre-training row says of its picture."""
    ground = f"The background is {scene.ground}."
    if scene.kind == "thing":
        kind = THINGS[scene.subject][1]
        return f"{article(scene.subject).capitalize()}, which {verb(scene.subject)} {article(kind)}. {ground}"
    if scene.kind == "flag":
        assert drawings is not None
        colours = listed(drawings.flag_colours(scene.subject))
        return f"A flag: {colours}." if scene.kept else f"The flag of {COUNTRIES[scene.subject]}: {colours}. {ground}"
    first = _form(scene.forms[0])
    if scene.kind == "pair":
        return f"A {first} {_WHERE[scene.place]} a {_form(scene.forms[1])}. {ground}"
    if scene.kind == "count":
        return f"{scene.count} {plural(first, scene.count)}. {ground}"
    return f"A {first}. {ground}"


def _form(form: tuple[str, str]) -> str:
    return f"{form[1]} {form[0]}"


def _other(dice: random.Random, names: object, right: str) -> str:
    assert isinstance(names, tuple | list | dict)
    return dice.choice([str(name) for name in names if name != right])


def _ground(scene: Scene, dice: random.Random) -> Question:
    text = dice.choice(("What colour is the background?", "Which colour has the background?"))
    wrong = f"The background is {_other(dice, COLOURS, scene.ground)}."
    return Question("background", text, f"The background is {scene.ground}.", (scene.ground,), _names(COLOURS), wrong)


def _about_thing(scene: Scene, dice: random.Random) -> list[Question]:
    name, kind = scene.subject, THINGS[scene.subject][1]
    kinds = tuple(dict.fromkeys(kind for _, kind in THINGS.values()))
    subject, wrong = ("These" if verb(name) == "are" else "This"), _other(dice, THINGS, name)
    what = Question(
        "thing",
        dice.choice(("What is this?", "What do you see?", "What is in the picture?")),
        f"{subject} {verb(name)} {article(name)}.",
        (name,),
        _names(THINGS),
        f"{'These' if verb(wrong) == 'are' else 'This'} {verb(wrong)} {article(wrong)}.",
        f"There is one thing on a {scene.ground} background. It looks like {article(kind)}. Of these it is most like {article(name)}.",
    )
    which = f"{article(name).capitalize()} {verb(name)} {article(kind)}."
    false = f"{article(name).capitalize()} {verb(name)} {article(_other(dice, kinds, kind))}."
    sort = Question("kind of thing", "What kind of thing is it?", which, (kind,), _names(kinds), false)
    asked = kind if dice.random() < 0.5 else _other(dice, kinds, kind)
    word = "Yes" if asked == kind else "No"
    yes = Question(
        "yes or no",
        f"Is it {article(asked)}?",
        f"{word}, it {'is' if word == 'Yes' else 'is not'} {article(asked)}.",
        (word,),
        (("yes",), ("no",)),
        f"{'No' if word == 'Yes' else 'Yes'}, it {'is not' if word == 'Yes' else 'is'} {article(asked)}.",
    )
    return [what, sort, yes, _ground(scene, dice)]


def _about_flag(scene: Scene, colours: list[str], dice: random.Random) -> list[Question]:
    have = Question(
        "colours of a flag",
        dice.choice(("Which colours does the flag have?", "What are the colours of this flag?")),
        f"The flag is {listed(colours)}.",
        tuple(colours),
        _names(("red", "orange", "yellow", "green", "blue", "black", "white")),
        f"The flag is {listed([*colours[1:], _other(dice, ('red', 'yellow', 'green', 'blue', 'black', 'white'), colours[0])][:3])}.",
    )
    if scene.subject not in COUNTRIES:
        return [have]
    country = COUNTRIES[scene.subject]
    whose = Question(
        "country of a flag",
        dice.choice(("Which country's flag is this?", "Whose flag is this?", "What flag is this?")),
        f"This is the flag of {country}.",
        (country.removeprefix("the "),),
        tuple((name.removeprefix("the "),) for name in COUNTRIES.values()),
        f"This is the flag of {_other(dice, list(COUNTRIES.values()), country)}.",
        f"This is a flag. Its colours are {listed(colours)}. Of the flags with these colours it is most like the one of {country}.",
    )
    sees = Question("thing", "What do you see?", f"This is the flag of {country}.", whose.key, whose.choices, whose.wrong)
    return [whose, have, sees] if dice.random() < 0.3 else [whose, have]


def _about_form(scene: Scene, dice: random.Random) -> list[Question]:
    name, colour = scene.forms[0]
    what = Question(
        "form and colour",
        dice.choice(("What is this?", "What do you see?", "What is in the picture?")),
        f"This is a {colour} {name}.",
        (colour, name),
        (*_names(COLOURS), *_names(FORMS)),
        f"This is a {colour} {_other(dice, FORMS, name)}." if dice.random() < 0.5 else f"This is a {_other(dice, COLOURS, colour)} {name}.",
        f"There is one thing on a {scene.ground} background. Its form is that of a {name}. It is filled with {colour}.",
    )
    asked, other = dice.choice(("What shape is it?", "Which form has it?")), _other(dice, FORMS, name)
    shape = Question("form", asked, f"It is a {name}.", (name,), _names(FORMS), f"It is a {other}.")
    false = f"The {name} is {_other(dice, COLOURS, colour)}."
    tint = Question("colour", f"What colour is the {name}?", f"The {name} is {colour}.", (colour,), _names(COLOURS), false)
    return [what, shape, tint, _ground(scene, dice)]


def _about_pair(scene: Scene, dice: random.Random) -> list[Question]:
    (first, first_colour), (second, second_colour) = scene.forms
    swapped = dice.random() < 0.5
    place = _OPPOSITE[scene.place] if swapped else scene.place
    one, other = (second, first) if swapped else (first, second)
    where = Question(
        "place",
        f"Where is the {one}?",
        f"The {one} is {_WHERE[place]} the {other}.",
        (place,),
        _names(PLACES),
        f"The {one} is {_WHERE[_OPPOSITE[place]]} the {other}.",
        f"I see a {_form(scene.forms[0])} and a {_form(scene.forms[1])}. The {first} is {_WHERE[scene.place]} the {second}.",
    )
    asked, colour = dice.choice(((first, first_colour), (second, second_colour)))
    tint = Question(
        "colour of one of two",
        f"What colour is the {asked}?",
        f"The {asked} is {colour}.",
        (colour,),
        _names(COLOURS),
        f"The {asked} is {_other(dice, COLOURS, colour)}.",
    )
    both = f"I see a {_form(scene.forms[0])} {_WHERE[scene.place]} a {_form(scene.forms[1])}."
    wrong = f"I see a {_form(scene.forms[0])} {_WHERE[_OPPOSITE[scene.place]]} a {_form(scene.forms[1])}."
    key = (first, first_colour, second, second_colour, scene.place)
    see = Question("two forms", "What do you see?", both, key, (*_names(COLOURS), *_names(FORMS), *_names(PLACES)), wrong)
    return [where, tint, see, _ground(scene, dice)]


def _about_count(scene: Scene, dice: random.Random) -> list[Question]:
    name, colour = scene.forms[0]
    number = scene.count
    numbers = tuple(range(1, MOST + 1))
    wrong = dice.choice([n for n in numbers if n != number])
    count = Question(
        "number",
        f"How many {plural(name, 2)} are there?",
        f"There {'is' if number == 1 else 'are'} {number} {plural(name, number)}.",
        (str(number),),
        _names(numbers),
        f"There {'is' if wrong == 1 else 'are'} {wrong} {plural(name, wrong)}.",
        f"I count the {plural(name, 2)}: {', '.join(map(str, numbers[:number]))}.",
    )
    seen = f"I see {number} {colour} {plural(name, number)}."
    other = f"I see {wrong} {colour} {plural(name, wrong)}."
    key, forms = (str(number), colour), (*_names(numbers), *_names(COLOURS))
    return [count, Question("number and colour", "What do you see?", seen, key, forms, other), _ground(scene, dice)]

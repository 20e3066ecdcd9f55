"""The model that comes with the repository: what it is, how large, whose work it learned from, and that it sees."""

import random

import pytest

from ernie45.config import Environment
from ernie45.engine.client import LLM
from ernie45.engine.request import SamplingParams
from ernie45.engine.threads import measure_threads
from ernie45.errors import CheckpointError
from ernie45.models import sighted
from ernie45.models.load import find_model, load, open_model
from story.packages import PACKAGES
from story.questions import ask
from story.scenes import Scenes

MOST = 40 << 20


def test_the_name_leads_to_experts_of_two_widths_in_four_bits():
    opened = open_model(find_model("sighted", Environment.read()))
    assert opened.vision is not None
    assert opened.config.experts.expert_size > 2 * opened.vision.expert_size
    assert opened.spec.scheme_for("layers.1.ffn.vision.experts").weight_bits == 4
    assert sum(file.stat().st_size for file in sighted.sighted_folder().iterdir()) <= MOST


def test_its_card_names_whom_it_learned_from():
    card = (sighted.sighted_folder() / "README.md").read_text("utf-8")
    assert all(package.name in card and package.licence in card for package in PACKAGES.values())
    assert "no ERNIE weights" in card


def test_it_tells_the_colours_of_pictures_it_has_not_seen(tmp_path):
    # its card says 55 of 80 for such pictures; 11 colours are known, so 12 of 24 by chance would be one in four million
    llm, maker, dice, right = LLM("sighted", num_pages=64), Scenes(77), random.Random(77), 0
    assert llm.template.source == "ernie-vl"
    for number in range(24):
        scene = maker.made("form", kept=True)
        question = ask(scene, None, dice)[2 + number % 2]  # of the form, of the background
        picture = tmp_path / f"{number}.png"
        scene.draw(None).save(picture)
        asked = [{"type": "image", "image": str(picture)}, {"type": "text", "text": question.text}]
        right += question.is_right(llm.chat([{"role": "user", "content": asked}], SamplingParams(temperature=0, max_tokens=12)).text)
    assert right >= 12


def test_trials_of_threads_show_it_no_placeholder():
    decoder = load(find_model("sighted", Environment.read()), environment=Environment.read()).decoder
    assert min(decoder.sight.config.placeholder_ids) < 10  # a prompt of any small numbers would have held it
    assert measure_threads(decoder, 2).reason


def test_a_checkout_without_it_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sighted, "__file__", str(tmp_path / "sighted.py"))
    with pytest.raises(CheckpointError, match="the model 'sighted' is not there; `make story` makes it"):
        find_model("sighted", Environment.read())

"""The model that comes with the repository: what it is, how large, whose work it learned from, and that it sees."""

from io import BytesIO

import pytest

from ernie45.config import Environment
from ernie45.engine.client import LLM
from ernie45.engine.request import SamplingParams
from ernie45.engine.threads import measure_threads
from ernie45.errors import CheckpointError
from ernie45.models import sighted
from ernie45.models.load import find_model, load, open_model
from story.packages import PACKAGES
from story.scenes import Scene
from story.words import COLOURS

MOST = 40 << 20
GROUNDS = ("red", "yellow", "green", "blue", "white", "black")


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


def test_it_tells_the_colours_of_grounds_it_has_not_seen(tmp_path):
    # pictures of the exam's sort, with numbers of their own; the exam has all right
    llm = LLM("sighted", num_pages=64)
    assert llm.template.source == "ernie-vl"
    said = []
    for number, ground in enumerate(GROUNDS):
        drawn = BytesIO()
        Scene("form", 10**6 + number, ground, (("circle", "purple"),), kept=True).draw(None).save(drawn, "png")
        picture = tmp_path / f"{ground}.png"
        picture.write_bytes(drawn.getvalue())
        asked = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What colour is the background?"}]
        said.append(llm.chat([{"role": "user", "content": asked}], SamplingParams(temperature=0, max_tokens=12)).text)
    right = [ground in text and not any(o in text for o in set(COLOURS) - {ground}) for ground, text in zip(GROUNDS, said, strict=True)]
    assert sum(right) >= len(GROUNDS) - 1, said


def test_trials_of_threads_show_it_no_placeholder():
    decoder = load(find_model("sighted", Environment.read()), environment=Environment.read()).decoder
    assert min(decoder.sight.config.placeholder_ids) < 10  # a prompt of any small numbers would have held it
    assert measure_threads(decoder, 2).text


def test_a_checkout_without_it_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sighted, "__file__", str(tmp_path / "sighted.py"))
    with pytest.raises(CheckpointError, match="the model 'sighted' is not there; `make story` makes it"):
        find_model("sighted", Environment.read())

"""`ernie data`: rows as the model will see them, in the terminal, on a page, and counted."""

import json

import pytest

from ernie45.cli import dispatch
from ernie45.errors import ConfigError, DataError
from ernie45.recipes.data import as_page, render
from ernie45.tokens.template import IGNORED, load_template
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.train.records import as_record

ROWS = [
    {"src": ["What is up?", "Sure?"], "tgt": ["The sky.", "<b>Yes</b>"], "label": [0, 1]},
    {"prompt": "And down?", "chosen": "The sea.", "rejected": "No."},
    {"text": "Plain text."},
]


@pytest.fixture
def sides(model):
    tokenizer = load_tokenizer(model)
    return tokenizer, load_template(model, tokenizer)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"txt": 1}\n', "utf-8")
    return path


def learned(shown, section=0):
    return "".join(part.text for part in shown.sections[section][1] if part.learned)


def test_what_is_learned_is_what_is_marked(sides):
    tokenizer, template = sides
    talk, pair, text = (render(as_record(row, "f"), tokenizer, template) for row in ROWS)
    assert learned(talk).startswith("<b>Yes</b>")
    assert "The sky" not in learned(talk)
    assert "The sky" in "".join(part.text for part in talk.sections[0][1])
    assert [name for name, _ in pair.sections] == ["prompt", "chosen", "rejected"]
    assert learned(pair) == ""
    assert learned(pair, 1).startswith("The sea.")
    assert learned(text).startswith("Plain text.")
    for shown in (talk, pair, text):
        assert shown.tokens == sum(
            len(tokenizer.encode(p.text, allow_special=True)) for _, parts in shown.sections for p in parts if p.text
        )


def test_a_label_that_is_another_token_is_said(sides):
    tokenizer, _ = sides
    from ernie45.recipes.data import parts

    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    made = parts((a, b, c), (IGNORED, b, a), tokenizer)
    assert [(part.text, part.learned, part.instead) for part in made] == [("a", False, ""), ("b", True, ""), ("c", True, "a")]


def test_the_page_escapes_what_rows_say(sides):
    tokenizer, template = sides
    page = as_page([render(as_record(ROWS[0], "<f>"), tokenizer, template)], "<m>")
    assert "<mark>&lt;b&gt;Yes&lt;/b&gt;" in page
    assert "<f>" not in page
    assert "<m>" not in page
    assert "default-src 'none'" in page


def test_preview_and_check(model, rows, tmp_path, capsys):
    words = ["--model", str(model)]
    assert dispatch(["data", "preview", str(rows), "--rows", "9", *words]) == 0
    out = capsys.readouterr()
    assert "line 3 · text" in out.out
    assert "⟦Plain text." in out.out
    assert "line 4" in out.err
    assert dispatch(["data", "preview", str(rows), "--html", str(tmp_path / "page.html"), *words]) == 0
    assert "<mark>" in (tmp_path / "page.html").read_text()
    assert dispatch(["data", "check", str(rows), *words]) == 1
    out = capsys.readouterr().out
    assert "rows      3  (1 conversation, 1 pair, 1 text)" in out
    assert "bad rows  1" in out
    with pytest.raises(DataError, match="there is no row 9; bad rows: 1"):
        dispatch(["data", "preview", str(rows), "--first", "9", *words])
    with pytest.raises(ConfigError, match="first must be at least 1"):
        dispatch(["data", "preview", str(rows), "--first", "0", *words])

"""The tokenizer of models that have none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.tokens.filler import filler_tokenizer
from ernie45.tokens.template import load_template
from ernie45.tokens.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filler")
    for name, content in filler_tokenizer(2000, bos_id=1, eos_id=2).items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_survives_at_a_byte_a_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())


def test_every_id_is_a_word_of_its_own(tokenizer):
    assert tokenizer.vocab_size == 2000
    words = [tokenizer.bytes_of(id) for id in range(2000)]
    assert len(set(words)) == 2000
    assert tokenizer.decode([1500, 1501]).startswith(" a")
    assert tokenizer.eos_ids == (2,)


def test_it_chats(folder, tokenizer):
    assert load_template(folder, tokenizer).source == "chatml"


def test_transformers_reads_the_same(folder, tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    text = "Grüße, 世界!\n"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (1, 2), (298, 299)])
def test_control_ids_lie_where_the_model_has_them(tmp_path, bos, eos):
    vocabulary = filler_tokenizer(300, bos_id=bos, eos_id=eos)["tokenizer.json"]["model"]["vocab"]
    assert (vocabulary["<s>"], vocabulary["</s>"]) == (bos, eos)
    assert sorted(vocabulary.values()) == list(range(300))

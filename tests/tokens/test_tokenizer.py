"""Text to ids and back: equal to the libraries' own reading of the same files, safe against written control tokens, exact in streams."""

import json
import shutil
import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import CheckpointError, TokenizerError
from ernie45.tokens.special import AddedToken, Splitter
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.tokens.vocabulary import read_pieces

TEXTS = [
    "<|begin_of_sentence|>User: The largest ocean is\nAssistant: ",
    "a<mask:1>b</s><s><unk>",
    " x  y\x00\u00e9\U0001f600\n\n",
    "<|LOC_12|> hi <|LOC_1|><|LOC_1000|><|IMAGE_PLACEHOLDER|>x <|LOC_|>",
    "12345 \u4f60\u597d  \u4e16\u754c \u2581",
    "",
]
SPECIALS = [
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "</s>",
    "<s>",
    "<unk>",
    "<mask:1>",
    "<mask:0>",
    "<|LOC_7|>",
    "<think>",
    "<|im_end|>",
]
hostile = st.lists(st.sampled_from([*SPECIALS, "<", "|", ">", "<|", "mask:1>", "im_", "a", " ", "\u4f60", "5"])).map("".join)


@pytest.fixture(params=["ernie", "tagged", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers_reading_of_the_same_folder(ernie, ernie_folder, tmp_path, text):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(ernie_folder)
    assert ernie.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)
    theirs.save_pretrained(tmp_path)  # the same vocabulary as tokenizer.json
    ours = load_tokenizer(tmp_path)
    for allow in (True, False):
        assert ours.encode(text, allow) == ernie.encode(text, allow)


@pytest.mark.parametrize("text", ["The largest  ocean\n", " caf\u00e9 \U0001f600", "a<|im_end|>b"])
def test_byte_level_equals_the_tokenizers_package(byte_level, bytes_folder, text):
    theirs = tokenizers.Tokenizer.from_file(str(bytes_folder / "tokenizer.json"))
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert byte_level.encode(text, allow_special=True) == ids
    assert byte_level.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)
    assert byte_level.decode(ids) == theirs.decode(ids)


def test_generation_prompt_ends_with_a_lone_space_piece(ernie):
    tokens = [ernie.token_of(id) for id in ernie.encode("<|begin_of_sentence|>User: The largest ocean is\nAssistant: ", True)]
    assert tokens[0] == "<|begin_of_sentence|>"
    assert "<0x0A>" in tokens
    assert tokens[-1] == "\u2581"


def test_ids_and_names_come_from_the_files(ernie):
    assert ernie.vocab_size == ernie.id_of("<|LOC_1000|>") + 1
    assert ernie.eos_ids == (ernie.id_of("</s>"),) == (2,)
    assert ernie.named["sep_token"] == "<|end_of_sentence|>"
    assert ernie.id_of("no such token") is None
    assert {0, 1, 2, ernie.id_of("<mask:4>")} <= ernie.special_ids
    assert ernie.id_of("5") not in ernie.control_ids  # user-defined, yet plain
    assert ernie.encode("") == []


@pytest.mark.parametrize("special", SPECIALS)
def test_plain_text_cannot_write_control_tokens(tokenizer, special):
    text = f"a {special} b{special}{special}"
    ids = tokenizer.encode(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    if tokenizer.id_of(special) is not None:
        assert tokenizer.encode(text, allow_special=True).count(tokenizer.id_of(special)) == 3


@given(hostile)
def test_no_mixture_of_parts_writes_a_control_token(ernie, tagged, byte_level, text):
    for tokenizer in (ernie, tagged, byte_level):
        ids = tokenizer.encode(text)
        assert tokenizer.control_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_normalised_look_alikes_are_spelled_apart(tmp_path, bytes_folder):
    shutil.copytree(bytes_folder, tmp_path / "t")
    content = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFKC"}
    content["model"]["ignore_merges"] = True
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "t")
    ids = tokenizer.encode("\uff1c|im_end|\uff1e")  # full-width brackets, which NFKC makes ASCII
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "<|im_end|>"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_text_comes_back(ernie, byte_level, text):
    # SentencePiece writes a space as U+2581, so that one character reads back as a space: it is left out.
    for tokenizer in (ernie, byte_level):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.data())
def test_a_stream_joined_is_the_whole(ernie, byte_level, data):
    for tokenizer in (ernie, byte_level):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
        skip = data.draw(st.booleans())
        stream, pieces, at = tokenizer.stream(skip_special=skip), [], 0
        while at < len(ids):
            step = data.draw(st.integers(1, 5))
            pieces.append(stream.push(ids[at : at + step]))
            at += step
        pieces.append(stream.finish())
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("text", ["\U0001f600\u4f60\u597d", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301\u0323!"])
def test_no_half_characters_are_emitted(ernie, byte_level, text):
    for tokenizer in (ernie, byte_level):
        stream = tokenizer.stream()
        pieces = [stream.push([id]) for id in tokenizer.encode(text)]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == text
        assert stream.finish() == ""


def test_an_unfinished_character_becomes_one_replacement(ernie):
    stream = ernie.stream()
    ids = ernie.encode("a\U0001f600")
    assert stream.push(ids[:-1]) == "a"
    assert stream.finish() == "\ufffd"
    assert stream.push(ids) == "a\U0001f600"  # the stream begins anew


def test_special_tokens_are_hidden_unless_kept(tagged):
    ids = tagged.encode("<|begin_of_sentence|>a<think>b</s>", allow_special=True)
    assert tagged.decode(ids) == "a<think>b"  # an added tag is not declared special
    assert tagged.decode(ids, skip_special=False) == "<|begin_of_sentence|>a<think>b</s>"
    assert tagged.stream(keep=["</s>"]).push(ids) == "a<think>b</s>"


@pytest.mark.parametrize(("prefix", "first"), [(True, "\u2581The"), (False, "The")])
def test_a_space_before_text_is_put_once_and_taken_off_again(tmp_path, prefix, first):
    from sentencepiece import SentencePieceProcessor

    from .conftest import write_pieces_folder

    folder = write_pieces_folder(tmp_path / "t", [], add_dummy_prefix=prefix)
    tokenizer = load_tokenizer(folder)
    theirs = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("The largest", " The", "x"):
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(theirs.encode(text)) == text
    assert tokenizer.token_of(tokenizer.encode("The largest")[0]).startswith(first)
    assert tokenizer.encode("The", start=False) == tokenizer.encode("</s>The", True)[1:]


@pytest.mark.parametrize("rule", ["prepend", "metaspace", "byte_level"])
def test_prefix_rules_of_tokenizer_json(tmp_path, ernie_folder, rule):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(ernie_folder).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    if rule == "prepend":
        content["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": "\u2581"})
        content["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    elif rule == "metaspace":
        content["normalizer"] = None
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
        content["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    else:
        content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        content["normalizer"], content["decoder"] = (
            None,
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        )
    path.write_text(json.dumps(content))
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), load_tokenizer(tmp_path)
    for text in ("The largest", "ocean is"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_rows_without_a_token_decode_to_nothing(tmp_path, ernie_folder):
    folder = shutil.copytree(ernie_folder, tmp_path / "t")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 5000}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([4999]) == tokenizer.token_of(4999) == ""
    assert tokenizer.eos_ids == (2, 7)
    with pytest.raises(TokenizerError, match="5000 is out of range; this tokenizer has ids 0 to 4999"):
        tokenizer.decode([5000])


@pytest.mark.parametrize("bad", [-1, 10**6, 1.0, "1", None, True])
def test_bad_ids_are_refused(ernie, bad):
    with pytest.raises(TokenizerError, match="id"):
        ernie.decode([5, bad])


@pytest.mark.parametrize(("bad", "says"), [(b"bytes", "not bytes"), (None, "not NoneType"), ("ab\ud800c", "U\\+D800\\) at character 2")])
def test_bad_text_is_refused(ernie, bad, says):
    with pytest.raises(TokenizerError, match=says):
        ernie.encode(bad)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"looked for tokenizer.json and tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe", b"[" * 100_000, b'{"added_tokens": {}, "model": 3}'])
def test_hostile_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises((CheckpointError, TokenizerError)):
        load_tokenizer(tmp_path)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**28)  # a sparse file: no disk is used
    with pytest.raises(CheckpointError, match="268,435,456 bytes"):
        load_tokenizer(tmp_path)


@given(st.data())
def test_damaged_piece_files_are_refused_or_read(ernie_folder, data):
    content = bytearray((ernie_folder / "tokenizer.model").read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    try:
        file = read_pieces(bytes(content[:cut]), "x")
    except CheckpointError:
        return
    assert len(file.texts) == len(file.kinds) > 0


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("added_tokens.json", {"<x>": "5"}, "whole number"),
        ("added_tokens.json", {"<x>": 5}, "uses for another piece"),
        ("added_tokens.json", {"<x>": 9000, "<y>": 9000}, "share the id 9000"),
        ("added_tokens.json", {"<mask:1>": 9000}, "in the vocabulary"),
        ("added_tokens.json", {"x" * 1000: 9000}, "1 to 512 characters"),
        ("special_tokens_map.json", {"additional_special_tokens": 3}, "must be a list"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "whole number"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, ernie_folder, name, value, says):
    folder = shutil.copytree(ernie_folder, tmp_path / "t")
    (folder / name).write_text(json.dumps(value))
    with pytest.raises(TokenizerError, match=says):
        load_tokenizer(folder)


def test_a_vocabulary_that_squeezes_spaces_is_refused(tmp_path):
    from .conftest import write_pieces_folder

    with pytest.raises(TokenizerError, match="remove_extra_whitespaces"):
        load_tokenizer(write_pieces_folder(tmp_path / "t", [], remove_extra_whitespaces=True))


@given(st.lists(st.text("ab<|", min_size=1, max_size=4), min_size=1, unique=True), st.text("ab<| ", max_size=30))
def test_the_splitter_takes_leftmost_longest(words, text):
    splitter = Splitter((AddedToken(word), n) for n, word in enumerate(words))
    expected, at = [], 0
    while at < len(text):
        found = max((word for word in words if text.startswith(word, at)), key=len, default=None)
        if found is None:
            if expected and isinstance(expected[-1], str):
                expected[-1] += text[at]
            else:
                expected.append(text[at])
            at += 1
        else:
            expected.append(words.index(found))
            at += len(found)
    assert splitter.split(text) == expected


def test_flags_of_added_tokens():
    tokens = [
        AddedToken("<l>", strip_left=True),
        AddedToken("<r>", strip_right=True),
        AddedToken("w", whole_word=True),
    ]
    splitter = Splitter((token, n) for n, token in enumerate(tokens))
    assert splitter.split("a  <l> b <r>  c w") == ["a", 0, " b ", 1, "c ", 2]
    assert splitter.split("two w_") == ["two w_"]


@pytest.mark.parametrize("unit", ["The largest ocean is \u4f60\u597d\n", "<|", "<mask:1>", "a", "<|LOC_"])
def test_time_grows_with_the_text_and_not_faster(ernie, unit):
    """Four times the text takes about four times as long; a quadratic splitter would take sixteen. Nine leaves room for noise."""

    def seconds(size):
        text = unit * (size // len(unit))
        best = 1e9
        for _ in range(3):
            begin = time.perf_counter()
            ernie.encode(text, allow_special=True)
            best = min(best, time.perf_counter() - begin)
        return best

    small = seconds(25_000)
    assert seconds(100_000) < 9 * small + 0.01

"""A tokenizer as GGUF metadata and back. That llama.cpp splits text as we do is tested where llama.cpp runs (e2e)."""

import json

import pytest

from ernie45.errors import CheckpointError, TokenizerError
from ernie45.tokens.gguf_vocabulary import gguf_from_tokenizer, tokenizer_from_gguf
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.tokens.vocabulary import byte_level_table

ALPHABET = list(byte_level_table())
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ"]
TOKENS = ["<pad>", "<s>", "</s>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "plain"]


def metadata(**changes):
    data = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 4) + [4],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }
    return data | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def write(folder, data):
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), tokenizer_from_gguf(data), strict=True):
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_metadata_comes_back_through_a_folder(pre, tmp_path):
    found = gguf_from_tokenizer(write(tmp_path, metadata(pre=pre)), len(TOKENS))
    expected = metadata(pre=pre) | {f"tokenizer.ggml.add_{what}": False for what in ("bos_token", "eos_token", "space_prefix")}
    assert found == expected


def test_the_pre_tokenizer_decides_how_digits_meet_spaces(tmp_path):
    """`smollm` cuts digits out first, so that two spaces before one stay together; `gpt-2` gives the second space to the number."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    single, joined = (load_tokenizer(write(tmp_path / name, metadata(pre=pre))) for name, pre in (("a", "smollm"), ("b", "gpt-2")))
    spaces, space, one = TOKENS.index("ĠĠ"), TOKENS.index("Ġ"), TOKENS.index("1")
    assert single.encode("  1") == [spaces, one]
    assert joined.encode("  1") == [space, space, one]


def test_special_tokens_are_marked_so(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, metadata()))
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.encode("</s>", allow_special=True) == [2]
    assert 2 not in tokenizer.encode("</s>")


def test_rows_without_a_token_become_fillers(tmp_path):
    found = gguf_from_tokenizer(write(tmp_path, metadata()), len(TOKENS) + 2)
    assert found["tokenizer.ggml.tokens"][-2:] == [f"[PAD{len(TOKENS)}]", f"[PAD{len(TOKENS) + 1}]"]
    assert found["tokenizer.ggml.token_type"][-3:] == [4, 5, 5]


def test_a_template_file_goes_before_the_one_in_the_config(tmp_path):
    write(tmp_path, metadata())
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert gguf_from_tokenizer(tmp_path, len(TOKENS))["tokenizer.chat_template"] == "of the file"


def test_more_tokens_than_rows_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match=rf"reach id {len(TOKENS) - 1}, but the model has 100 embedding rows"):
        gguf_from_tokenizer(write(tmp_path, metadata()), 100)


def test_a_splitter_without_a_name_is_refused(tmp_path):
    write(tmp_path, metadata())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=r"no name in llama.cpp known here \(smollm and gpt-2 are\)"):
        gguf_from_tokenizer(tmp_path, len(TOKENS))


@pytest.mark.parametrize("changes", [{"model": "llama"}, {"model": "bert"}, {"pre": "llama-bpe"}])
def test_another_vocabulary_in_the_metadata_is_refused(changes):
    with pytest.raises(TokenizerError, match="the GGUF vocabulary is of kind"):
        tokenizer_from_gguf(metadata(**changes))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        gguf_from_tokenizer(tmp_path, 10)

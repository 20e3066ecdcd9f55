"""A folder as ERNIE-4.5-0.3B-Base-PT is published, small files to the letter, full size, with random weights in place of the real ones.

The vocabulary has the published 100,295 pieces (a small trained one, filled up) and the 1,009 added tokens behind them, so that every id of
the model is where it is in the original. `tests/data` keeps the published config, generation config and tokenizer config.
"""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers

from ernie45 import LLM, SamplingParams
from ernie45.models.config import TextConfig
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.tokens.tokenizer import load_tokenizer
from tests.tokens.conftest import PLACEHOLDERS, train_pieces

DATA = Path(__file__).parent.parent / "data"
PUBLISHED = ("config.json", "generation_config.json", "tokenizer_config.json")
PIECES = 100_295
MARKS = ["<|LOC_BEGIN|>", "<|LOC_END|>", "<|LOC_SEP|>", "<|CROP_COL_SEP|>", "<|CROP_ROW_SEP|>", "<|IMAGE_SEP|>"]
ADDED = {token: PIECES + n for n, token in enumerate([*PLACEHOLDERS, *MARKS])}


def filled(model: bytes, wanted: int) -> bytes:
    """A SentencePiece model with filler pieces up to `wanted`: appended records of a repeated field belong to the message."""
    import sentencepiece

    have = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    records = []
    for n in range(have, wanted):
        text = f"\u2581filler{n}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -float(n)) + b"\x18\x01"
        records.append(b"\x0a" + bytes([len(piece)]) + piece)
    return model + b"".join(records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("published") / "ERNIE-4.5-0.3B-Base-PT"
    config = TextConfig.from_hf(json.loads((DATA / "ernie-4.5-0.3b-base-pt.config.json").read_text()))
    torch.set_default_dtype(torch.bfloat16)
    try:
        decoder = Decoder(config).initialise(torch.Generator().manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    save_model(decoder, made)
    for name in PUBLISHED:
        shutil.copy(DATA / f"ernie-4.5-0.3b-base-pt.{name}", made / name)
    (made / "tokenizer.model").write_bytes(filled(train_pieces(), PIECES))
    (made / "added_tokens.json").write_text(json.dumps(ADDED))
    return made


def test_the_added_tokens_are_the_published_ones():
    assert len(ADDED) == 1009
    assert (ADDED["<|IMAGE_PLACEHOLDER|>"], ADDED["<|LOC_0|>"], ADDED["<|LOC_1000|>"]) == (100_295, 100_297, 101_297)
    assert (ADDED["<|LOC_BEGIN|>"], ADDED["<|IMAGE_SEP|>"]) == (101_298, 101_303)


def test_it_loads_renders_and_generates_as_it_stands(folder):
    assert json.loads((folder / "config.json").read_text())["auto_map"], "the remote code entries must be there to be ignored"
    llm = LLM(folder, dtype="float32")
    assert llm.template is not None
    prompt = llm.render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The largest ocean is"}])
    assert prompt.text == "<|begin_of_sentence|>Be brief.\nUser: The largest ocean is\nAssistant: "
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == PIECES + 1009
    assert prompt.ids[0] == tokenizer.id_of("<|begin_of_sentence|>")
    answer = llm.chat("The largest ocean is", SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    assert len(answer.token_ids) == 6
    assert answer.finish_reason.value == "length"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = torch.tensor([llm.render("The largest ocean is").ids])
    expected = theirs.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert answer.token_ids == tuple(expected[0, asked.shape[1] :].tolist())


def test_its_advice_on_sampling_is_followed(folder):
    from ernie45.recipes.chat import ChatConfig, sampling_settings
    from ernie45.recipes.speaker import read_generation_config

    settings = sampling_settings(ChatConfig(), read_generation_config(folder))
    assert (settings["temperature"], settings["top_p"]) == (0.8, 0.8)

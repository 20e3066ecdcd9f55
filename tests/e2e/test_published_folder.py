"""A folder as ERNIE-4.5-0.3B-Base-PT is published, small files to the letter, full size, with random weights in place of the real ones.

The vocabulary has the published 100,295 pieces (those that are known at their ids, filled up) and the 1,009 added tokens behind them.
`tests/data` keeps the published config, generation config and tokenizer config.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from ernie45 import LLM, SamplingParams
from ernie45.models.config import TextConfig
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.tokens.template import load_template
from ernie45.tokens.tokenizer import load_tokenizer
from tests.tokens.conftest import PLACEHOLDERS, train_pieces

DATA = Path(__file__).parent.parent / "data"
PUBLISHED = ("config.json", "generation_config.json", "tokenizer_config.json")
PIECES = 100_295
MARKS = ["<|LOC_BEGIN|>", "<|LOC_END|>", "<|LOC_SEP|>", "<|CROP_COL_SEP|>", "<|CROP_ROW_SEP|>", "<|IMAGE_SEP|>"]
ADDED = {token: PIECES + n for n, token in enumerate([*PLACEHOLDERS, *MARKS])}


# Ids of a real run: cls, then "User: The largest ocean is", a line break, and "Assistant: " with its last space a token of its own.
GOLDEN = (100_273, 2969, 93_963, 93_919, 700, 12_145, 30_559, 357, 23, 92_267, 93_963, 93_919)
WORDS = {
    2969: "User",
    93_963: ":",
    93_919: "\u2581",
    700: "The",
    12_145: "\u2581largest",
    30_559: "\u2581ocean",
    357: "\u2581is",
    92_267: "Assistant",
    100_273: "<|begin_of_sentence|>",
    100_272: "<|end_of_sentence|>",
}


def published_pieces() -> bytes:
    """A SentencePiece model with the published layout as far as it is known: unknown, start, end, digits, bytes from id 13, then words.

    The words above stand where the real run has them. A BPE word is reached by merges, so every beginning of it is a piece too; whatever
    else there is room for is filler that no text holds.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(train_pieces())
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    head = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    head += [(digit, kinds.USER_DEFINED) for digit in "0123456789"]
    head += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    letters = {piece.piece for piece in model.pieces if len(piece.piece) == 1 and piece.type == kinds.NORMAL}
    beginnings = {word[:end] for word in WORDS.values() if not word.startswith("<") for end in range(1, len(word))}
    spare = sorted((letters | beginnings | set("Uaceghilnorst")) - set(WORDS.values()) - set("0123456789"))
    marks = [f"<mask:{n}>" for n in range(8)]
    del model.pieces[:]
    for number in range(PIECES):
        if number < len(head):
            text, kind = head[number]
        elif number in WORDS:
            text, kind = WORDS[number], kinds.USER_DEFINED if WORDS[number].startswith("<|") else kinds.NORMAL
        elif number >= 100_260 and marks:
            text, kind = marks.pop(), kinds.USER_DEFINED
        else:
            text, kind = (spare.pop(0) if spare else f"\u2581filler{number}"), kinds.NORMAL
        # longer beginnings first, so that a word grows from its left end
        model.pieces.add(piece=text, score=-float(number) if len(text) == 1 or "filler" in text else float(len(text)), type=kind)
    return model.SerializeToString()


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
    (made / "tokenizer.model").write_bytes(published_pieces())
    (made / "added_tokens.json").write_text(json.dumps(ADDED))
    return made


def test_the_added_tokens_are_the_published_ones():
    assert len(ADDED) == 1009
    assert (ADDED["<|IMAGE_PLACEHOLDER|>"], ADDED["<|LOC_0|>"], ADDED["<|LOC_1000|>"]) == (100_295, 100_297, 101_297)
    assert (ADDED["<|LOC_BEGIN|>"], ADDED["<|IMAGE_SEP|>"]) == (101_298, 101_303)


def test_a_prompt_has_the_ids_of_a_real_run(folder):
    tokenizer = load_tokenizer(folder)
    prompt = load_template(folder, tokenizer).render([{"role": "user", "content": "The largest ocean is"}])
    assert prompt.text == "<|begin_of_sentence|>User: The largest ocean is\nAssistant: "
    assert prompt.ids == GOLDEN


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

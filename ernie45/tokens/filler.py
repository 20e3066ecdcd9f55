"""A tokenizer for models that have none: bytes, and made-up words up to the size of the vocabulary.

It lets a checkpoint of random weights be served, exported and talked to: any text can be encoded, one token a byte, and every id decodes to
a word of four letters. The format is byte-level BPE without merges, which llama.cpp and transformers read as well.
"""

import itertools
import string
from typing import Any

_UNKNOWN, _START, _END = "<unk>", "<|im_start|>", "<|im_end|>"
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def filler_tokenizer(vocab_size: int, *, bos_id: int, eos_id: int) -> dict[str, dict[str, Any]]:
    """`tokenizer.json` and `tokenizer_config.json`, by name, for a vocabulary of at least 300 ids."""
    assert vocab_size >= 300, "bytes and control tokens take 261 ids"
    control = {bos_id: "<s>", eos_id: "</s>"}
    free = (id for id in range(vocab_size) if id not in control)
    control |= dict(zip(free, (_UNKNOWN, _START, _END), strict=False))
    words = itertools.chain(_byte_letters(), ("Ġ" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4)))
    texts = [control[id] if id in control else next(words) for id in range(vocab_size)]
    added = [
        {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for id, text in sorted(control.items())
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {text: id for id, text in enumerate(texts)},
        "merges": [],
    }
    parts = {"pre_tokenizer": _BYTE_LEVEL, "decoder": _BYTE_LEVEL, "model": model, "added_tokens": added}
    empty = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": _UNKNOWN,
        "chat_template": _TEMPLATE,
    }
    return {"tokenizer.json": empty | parts, "tokenizer_config.json": settings}


def _byte_letters() -> list[str]:
    """The 256 letters that byte-level BPE writes bytes as: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]

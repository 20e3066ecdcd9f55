"""A tokenizer as GGUF metadata, and back: what llama.cpp calls the `llama` (SentencePiece) and `gpt2` (byte-level BPE) vocabularies.

llama.cpp does not take a pre-tokenizer as data, it knows some by name (`tokenizer.ggml.pre`); a `tokenizer.json` whose splitting has no
such name here is refused, since a wrong one would give other ids without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from ernie45.errors import TokenizerError
from ernie45.tokens.special import DeclaredTokens, read_declared, read_file, read_json_object, read_optional
from ernie45.tokens.vocabulary import PieceKind, read_pieces, read_tokenizers

# llama.cpp's name of a byte-level pre-tokenizer -> its steps in a `tokenizer.json`; each is split further by GPT-2's pattern.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE: dict[str, list[dict[str, Any]]] = {"smollm": [_SINGLE_DIGITS, _BYTE_LEVEL], "gpt-2": [_BYTE_LEVEL]}
_NAMED = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
_KEY = "tokenizer.ggml."


def gguf_from_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a model folder; ids that no token has, up to `vocab_size` embedding rows, become unused fillers.

    `tokenizer.model` is taken where there is one. Raises `TokenizerError` for a tokenizer llama.cpp has no name for, or more tokens than
    `vocab_size`; `CheckpointError` for missing or damaged files.
    """
    pieces, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    data, ids = _from_pieces(pieces, vocab_size) if pieces.exists() else _from_json(fast, vocab_size)
    settings = read_optional(folder / "tokenizer_config.json")
    declared = read_declared(folder)
    for name, key in _NAMED.items():
        if declared.named.get(name) in ids:
            data[_KEY + key] = ids[declared.named[name]]
    data[_KEY + "add_bos_token"] = bool(settings.get("add_bos_token", False))
    data[_KEY + "add_eos_token"] = bool(settings.get("add_eos_token", False))
    template = settings.get("chat_template")
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        template = read_file(jinja).decode("utf-8", errors="replace")
    if isinstance(template, str):
        data["tokenizer.chat_template"] = template
    return data


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of `tokenizer.json` and `tokenizer_config.json` for a byte-level BPE vocabulary in GGUF metadata.

    Raises `TokenizerError` for another kind of vocabulary or an unknown pre-tokenizer.
    """
    model, pre = metadata.get(_KEY + "model"), metadata.get(_KEY + "pre", "gpt-2")
    if model != "gpt2" or pre not in _PRE:
        raise TokenizerError(f"the GGUF vocabulary is of kind {model!r}, pre-tokenizer {pre!r}; read here: 'gpt2' with {' or '.join(_PRE)}")
    tokens: list[str] = metadata[_KEY + "tokens"]
    kinds: list[int] = metadata.get(_KEY + "token_type") or [int(PieceKind.NORMAL)] * len(tokens)
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": kind == PieceKind.CONTROL}
        for i, kind in enumerate(kinds)
        if kind in (PieceKind.CONTROL, PieceKind.USER_DEFINED)
    ]
    steps = _PRE[pre]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens) if kinds[i] != PieceKind.UNUSED},
            "merges": [merge.split(" ") for merge in metadata[_KEY + "merges"]],
        },
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(metadata.get(_KEY + "add_bos_token", False)),
        "additional_special_tokens": [entry["content"] for entry in added if entry["special"]],
    }
    settings |= {name: tokens[metadata[_KEY + key]] for name, key in _NAMED.items() if _KEY + key in metadata}
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return tokenizer, settings


def _from_pieces(path: Path, vocab_size: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Metadata and token ids of a SentencePiece file; GGUF's token kinds are SentencePiece's."""
    file = read_pieces(read_file(path), str(path))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts, kinds = list(file.texts), list(file.kinds)
    scores = [float(processor.GetScore(id)) for id in range(len(texts))]
    texts, kinds = _with_added(texts, kinds, read_declared(path.parent), vocab_size, str(path))
    # below every real piece, so that a filler never wins a merge
    scores += [-10_000.0] * (len(texts) - len(scores))
    data = {
        _KEY + "model": "llama",
        _KEY + "pre": "default",
        _KEY + "tokens": texts,
        _KEY + "scores": scores,
        _KEY + "token_type": kinds,
        _KEY + "add_space_prefix": file.adds_space,
    }
    return data, {text: id for id, text in reversed(list(enumerate(texts)))}


def _from_json(path: Path, vocab_size: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Metadata and token ids of a byte-level BPE `tokenizer.json`."""
    content = read_json_object(path)
    pre = _pre_name(content, path)
    vocabulary = read_tokenizers(path)
    size = max(vocabulary.ids.values(), default=-1) + 1
    texts, kinds = [""] * size, [int(PieceKind.UNUSED)] * size
    for text, id in vocabulary.ids.items():
        texts[id], kinds[id] = text, int(PieceKind.NORMAL)
    texts = [text or f"[PAD{id}]" for id, text in enumerate(texts)]
    texts, kinds = _with_added(texts, kinds, read_declared(path.parent, vocabulary.added), vocab_size, str(path))
    merges = content["model"].get("merges") or []
    data = {
        _KEY + "model": "gpt2",
        _KEY + "pre": pre,
        _KEY + "tokens": texts,
        _KEY + "token_type": kinds,
        _KEY + "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        _KEY + "add_space_prefix": False,
    }
    return data, {text: id for id, text in enumerate(texts)}


def _pre_name(content: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name for the way a `tokenizer.json` splits text."""
    model = content.get("model")
    splitter = content.get("pre_tokenizer")
    if isinstance(model, dict) and model.get("type") == "BPE" and content.get("normalizer") is None and isinstance(splitter, dict):
        steps = splitter.get("pretokenizers", [splitter])
        for name, known in _PRE.items():
            if isinstance(steps, list) and list(map(_essential, steps)) == list(map(_essential, known)):
                return name
    raise TokenizerError(
        f"{path} splits text in a way that has no name in llama.cpp known here ({' and '.join(_PRE)} are); "
        "put the SentencePiece file tokenizer.model into the folder if the model has one"
    )


def _essential(step: object) -> object:
    """A pre-tokenizer step without what does not change ids."""
    if not isinstance(step, dict):
        return step
    return {"use_regex": True} | {k: v for k, v in step.items() if k != "trim_offsets"} if step.get("type") == "ByteLevel" else step


def _with_added(texts: list[str], kinds: list[int], declared: DeclaredTokens, vocab_size: int, where: str) -> tuple[list[str], list[int]]:
    """The vocabulary grown to `vocab_size`: added tokens in their places, special ones marked, fillers elsewhere."""
    # llama.cpp finds a control token only where the caller allows it, a user-defined one in any text
    ids = {text: id for id, text in reversed(list(enumerate(texts)))}
    places = {(token.id if token.id is not None else ids.get(text)): text for text, token in declared.added.items()}
    places |= {ids[text]: text for text in declared.special if text in ids}
    last = max([len(texts) - 1, *(id for id in places if id is not None)])
    if last >= vocab_size:
        raise TokenizerError(f"{where} and the folder's added tokens reach id {last}, but the model has {vocab_size} embedding rows")
    texts = texts + [f"[PAD{id}]" for id in range(len(texts), vocab_size)]
    kinds = kinds + [int(PieceKind.UNUSED)] * (vocab_size - len(kinds))
    for id, text in places.items():
        if id is None:
            raise TokenizerError(f"{where}: the added token '{text}' has no id")
        texts[id] = text
        if kinds[id] != PieceKind.UNKNOWN:
            kinds[id] = int(PieceKind.CONTROL if text in declared.special else PieceKind.USER_DEFINED)
    return texts, kinds

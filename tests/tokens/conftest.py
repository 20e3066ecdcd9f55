"""Small tokenizer folders of every kind, made once: SentencePiece replicas of the 0.3B and the Thinking/VL folders, and a byte-level BPE.

`tests/data/ernie-4.5-0.3b-base-pt.tokenizer_config.json` is the file of that name in baidu/ERNIE-4.5-0.3B-Base-PT, as published.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from ernie45.tokens.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent.parent / "data"
CORPUS = [
    "User: The largest ocean is",
    "Assistant: The Pacific is the largest ocean of all, then comes the Atlantic.",
    "There are 12345 words and 67890 numbers; caf\u00e9, na\u00efve, \u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "def f(x):  return x + 1   # two  spaces",
] * 20
PLACEHOLDERS = ["<|IMAGE_PLACEHOLDER|>", "<|AUDIO_PLACEHOLDER|>", *(f"<|LOC_{n}|>" for n in range(1001))]
TAGS = ["<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>", "<think>", "</think>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_pieces(**changes) -> bytes:
    """A SentencePiece model made the way ERNIE's is: BPE, byte fallback, no space put before, digits and marks user-defined."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 480,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "user_defined_symbols": [
            *"0123456789",
            *(f"<mask:{n}>" for n in range(8)),
            "<|end_of_sentence|>",
            "<|begin_of_sentence|>",
        ],
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **(settings | changes))
    return model.getvalue()


def write_pieces_folder(folder: Path, added: list[str], **changes) -> Path:
    """A model folder as the published 0.3B one, with a small vocabulary: no tokenizer.json, class Ernie4_5_Tokenizer, auto_map."""
    folder.mkdir()
    model = train_pieces(**changes)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "added_tokens.json").write_text(json.dumps({text: size + n for n, text in enumerate(added)}))
    (folder / "config.json").write_text(json.dumps({"model_type": "ernie4_5"}))
    shutil.copy(DATA / "ernie-4.5-0.3b-base-pt.tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


@pytest.fixture(scope="session")
def ernie_folder(tmp_path_factory) -> Path:
    return write_pieces_folder(tmp_path_factory.mktemp("tokens") / "ernie", PLACEHOLDERS)


@pytest.fixture(scope="session")
def tagged_folder(tmp_path_factory) -> Path:
    return write_pieces_folder(tmp_path_factory.mktemp("tokens") / "tagged", PLACEHOLDERS[:1] + TAGS)


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory) -> Path:
    """Byte-level BPE with ChatML, as SmolLM2's."""
    folder = tmp_path_factory.mktemp("tokens") / "bytes"
    folder.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return folder


@pytest.fixture(scope="session")
def ernie(ernie_folder) -> Tokenizer:
    return load_tokenizer(ernie_folder)


@pytest.fixture(scope="session")
def tagged(tagged_folder) -> Tokenizer:
    return load_tokenizer(tagged_folder)


@pytest.fixture(scope="session")
def byte_level(bytes_folder) -> Tokenizer:
    return load_tokenizer(bytes_folder)

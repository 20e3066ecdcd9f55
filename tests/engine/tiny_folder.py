"""A real model folder of a few kilobytes: random weights, a vocabulary of bytes, a chat template."""

import dataclasses
import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ernie45.models.save import save_model
from tests.engine.test_engine import build

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def save_tiny(folder, config, seed=0):
    """Writes it and returns its decoder."""
    decoder = build(dataclasses.replace(config, vocab_size=261), seed)
    save_model(decoder, folder)
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return decoder

"""A GGUF file of this project under the name of Qwen3, for engines that read no ERNIE: same matrices, same products, other text.

python benchmarks/as_qwen3.py IN.gguf OUT.gguf

Qwen3 norms queries and keys, so each layer gets two norms of ones more than ERNIE has; its tokenizer works on bytes, so the vocabulary
becomes names without meaning. What is left is the time of the shape: `benchmarks/four_bit.py --qwen3 OUT.gguf` gives it to OpenVINO GenAI.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

_SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
_KEPT = (
    *_SIZES,
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
)
_BYTE_NAMES = [
    chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))
]  # how byte-level tokenizers write bytes
_ENDS = ["<unk>", "<s>", "</s>"]


def rewrite(source: Path, target: Path) -> None:
    """Write `target`. Raises KeyError for a file that is no decoder of ours."""
    file = gguf.GGUFReader(source)
    name = file.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, "qwen3")
    for key in _KEPT:
        value = file.fields[f"{name}.{key}"].contents()
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"qwen3.{key}", value)
    writer.add_file_type(file.fields["general.file_type"].contents())
    _add_tokenizer(writer, len(file.fields["tokenizer.ggml.tokens"].data))
    head_size = file.fields[f"{name}.attention.key_length"].contents()
    for tensor in file.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        if tensor.name.endswith(".attn_norm.weight"):
            for part in ("q", "k"):
                writer.add_tensor(tensor.name.replace("attn_norm", f"attn_{part}_norm"), np.ones(head_size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Bytes, one pair, and names up to `size`: as much as a byte-level tokenizer has to have."""
    names = [*_BYTE_NAMES, "ab"]
    names += [f"x{number}" for number in range(size - len(names) - len(_ENDS))] + _ENDS
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.NORMAL] * (size - len(_ENDS)) + [gguf.TokenType.CONTROL] * len(_ENDS))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(size - 2)
    writer.add_eos_token_id(size - 1)
    writer.add_pad_token_id(size - 1)
    writer.add_chat_template("{{ messages[0]['content'] }}")


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]), Path(sys.argv[2]))

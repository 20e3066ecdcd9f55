"""A configuration through GGUF metadata and back."""

import pytest
import torch

from ernie45.errors import CheckpointError
from ernie45.models.gguf_config import config_from_gguf, config_to_gguf
from ernie45.models.names import name_table
from ernie45.models.released import tiny
from ernie45.models.text import Decoder


def described(config):
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
    return config_to_gguf(config), {piece.file: piece.shape for piece in name_table(config, "gguf").save_plan(shapes)}


@pytest.mark.parametrize("experts", [False, True])
def test_there_and_back(experts):
    config = tiny(experts=experts)
    metadata, shapes = described(config)
    assert config_from_gguf(metadata, shapes, "x") == config


def test_what_the_metadata_leaves_open_is_read_off_the_tensors():
    config = tiny()
    metadata, shapes = described(config)
    del metadata["ernie4_5.attention.key_length"], metadata["ernie4_5.vocab_size"]
    metadata["ernie4_5.attention.layer_norm_rms_epsilon"] = torch.tensor(1e-5).item()
    back = config_from_gguf(metadata, shapes | {"output.weight": (512, 64)}, "x")
    assert (back.head_size, back.vocab_size, back.tie_embeddings, back.norm_eps) == (32, 512, False, 1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"general.architecture": "llama"}, "'llama' is not of the ERNIE 4.5 family; supported"),
        ({"ernie4_5-moe.rope.scaling.type": "yarn"}, "yarn"),
        ({"ernie4_5-moe.block_count": None}, "lacks the metadata ernie4_5-moe.block_count"),
        ({"ernie4_5-moe.block_count": 0}, "whole number of at least 1"),
        ({"ernie4_5-moe.expert_used_count": "2"}, "whole number"),
        ({"ernie4_5-moe.rope.freq_base": float("nan")}, "above 0"),
        ({"ernie4_5-moe.expert_used_count": 9}, "top_k 9"),
    ],
)
def test_what_cannot_be_a_model_is_refused(change, word):
    metadata, shapes = described(tiny(experts=True))
    with pytest.raises(CheckpointError, match=word):
        config_from_gguf(metadata | change, shapes, "x")


def test_tensors_that_cannot_be_a_model_are_refused():
    metadata, shapes = described(tiny(experts=True))
    with pytest.raises(CheckpointError, match=r"lacks token_embd"):
        config_from_gguf(metadata, {}, "x")
    dense = {name: shape for name, shape in shapes.items() if "ffn_gate_inp" not in name}
    with pytest.raises(CheckpointError, match=r"without any blk.N.ffn_gate_inp"):
        config_from_gguf(metadata, dense, "x")

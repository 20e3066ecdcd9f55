"""A `TextConfig` out of a GGUF file's metadata, for llama.cpp's architectures `ernie4_5` and `ernie4_5-moe`, and back."""

from collections.abc import Mapping
from typing import Any

from ernie45.errors import CheckpointError
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.weights.rename import Shape

ARCHITECTURES = ("ernie4_5", "ernie4_5-moe")


def config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> TextConfig:
    """The model a GGUF file holds. `shapes` (tensor name -> shape) says what the metadata leaves open.

    Head size where no key length is given, vocabulary, tying, and which layers have experts. Raises CheckpointError for another
    architecture, a missing or ill-typed entry, or rotary scaling, which is not computed here.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(f"{where}: architecture {arch!r} is not of the ERNIE 4.5 family; supported: {', '.join(ARCHITECTURES)}")
    if metadata.get(f"{arch}.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{where}: rope.scaling.type is {metadata[f'{arch}.rope.scaling.type']!r}; only 'none' is computed here")
    embed, query = shapes.get("token_embd.weight"), shapes.get("blk.0.attn_q.weight")
    if embed is None or query is None or len(embed) != 2 or len(query) != 2:
        raise CheckpointError(f"{where}: lacks token_embd.weight or blk.0.attn_q.weight as matrices; convert the model again")
    heads = _whole(metadata, f"{arch}.attention.head_count", where)
    layers = _whole(metadata, f"{arch}.block_count", where)
    return TextConfig(
        hidden_size=_whole(metadata, f"{arch}.embedding_length", where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_whole(metadata, f"{arch}.attention.head_count_kv", where, heads),
        head_size=_whole(metadata, f"{arch}.attention.key_length", where, query[0] // heads),
        ffn_size=_whole(metadata, f"{arch}.feed_forward_length", where),
        vocab_size=embed[0],
        rope_theta=_fraction(metadata, f"{arch}.rope.freq_base", where, 500_000.0),
        norm_eps=_fraction(metadata, f"{arch}.attention.layer_norm_rms_epsilon", where, 1e-5),
        max_positions=_whole(metadata, f"{arch}.context_length", where),
        tie_embeddings="output.weight" not in shapes,
        use_bias="blk.0.attn_q.bias" in shapes,
        experts=_experts(metadata, shapes, arch, layers, where) if arch.endswith("-moe") else None,
        bos_id=_whole(metadata, "tokenizer.ggml.bos_token_id", where, 1, least=0),
        eos_ids=(_whole(metadata, "tokenizer.ggml.eos_token_id", where, 2, least=0),),
        pad_id=_whole(metadata, "tokenizer.ggml.padding_token_id", where, 0, least=0),
    )


def config_to_gguf(config: TextConfig) -> dict[str, Any]:
    """The architecture part of a GGUF file's metadata (no tokenizer), which `config_from_gguf` and llama.cpp read."""
    arch = ARCHITECTURES[1] if config.experts else ARCHITECTURES[0]
    data: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_size,
        "vocab_size": config.vocab_size,
    }
    if config.experts:
        e = config.experts
        data |= {
            "expert_count": e.num_experts,
            "expert_used_count": e.top_k,
            "interleave_moe_layer_step": e.interval,
            "leading_dense_block_count": e.first_layer,
            "expert_feed_forward_length": e.expert_size,
        }
        if e.num_shared:
            data |= {"expert_shared_count": e.num_shared, "expert_shared_feed_forward_length": e.shared_size}
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in data.items()}


def _experts(metadata: Mapping[str, Any], shapes: Mapping[str, Shape], arch: str, layers: int, where: str) -> ExpertsConfig:
    """The experts. The last expert layer is read off the tensors: the metadata has no word for it."""
    routed = [layer for layer in range(layers) if f"blk.{layer}.ffn_gate_inp.weight" in shapes]
    if not routed:
        raise CheckpointError(f"{where}: architecture {arch} without any blk.N.ffn_gate_inp.weight; convert the model again")
    return ExpertsConfig(
        num_experts=_whole(metadata, f"{arch}.expert_count", where),
        top_k=_whole(metadata, f"{arch}.expert_used_count", where),
        expert_size=_whole(metadata, f"{arch}.expert_feed_forward_length", where),
        num_shared=_whole(metadata, f"{arch}.expert_shared_count", where, 0, least=0),
        first_layer=_whole(metadata, f"{arch}.leading_dense_block_count", where, 0, least=0),
        last_layer=routed[-1],
        interval=_whole(metadata, f"{arch}.interleave_moe_layer_step", where, 1),
    )


def _whole(metadata: Mapping[str, Any], key: str, where: str, default: int | None = None, least: int = 1) -> int:
    value = metadata.get(key, default)
    if value is None:
        raise CheckpointError(f"{where}: lacks the metadata {key}; convert the model again")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(f"{where}: {key} must be a whole number of at least {least}, not {value!r}")
    return value


def _fraction(metadata: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = metadata.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"{where}: {key} must be a number above 0, not {value!r}")
    # metadata holds float32; its shortest decimal is what the model's author wrote (1e-05, not 9.99999974e-06)
    return float(f"{value:.7g}")

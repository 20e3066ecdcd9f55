"""What a model of the family is, as plain frozen data. No torch here: plans, tables and schedulers read it.

`TextConfig.from_hf` reads a published `config.json` and refuses what it does not know: an architecture flag that is silently dropped is a
wrong model. Field meanings and released values: ERNIE 4.5 technical report and the published configuration files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ernie45.errors import CheckpointError, did_you_mean

DENSE_TYPE = "ernie4_5"
EXPERTS_TYPE = "ernie4_5_moe"
VISION_TYPES = ("ernie4_5_moe_vl", "ernie4_5_vl_moe")
# Early builds of the Paddle checkpoints call both families just "ernie"; the expert fields tell them apart.
_TEXT_TYPES = (DENSE_TYPE, EXPERTS_TYPE, "ernie")

# Keys that carry no architecture, by what they carry.
WITHOUT_EFFECT = {
    "provenance": "architectures auto_map model_type model_name transformers_version _name_or_path ernie45_source torch_dtype dtype",
    "token ids that the tokenizer's files decide": "sep_token_id cls_token_id",
    "habits of transformers": (
        "use_cache output_attentions output_hidden_states output_router_logits return_dict chunk_size_feed_forward is_encoder_decoder "
        "id2label label2id problem_type attn_implementation _attn_implementation _attn_implementation_internal experts_implementation "
        "_experts_implementation mlp_layer_types"
    ),
    "habits of Paddle": (
        "use_rmsnorm fuse_rms_norm use_fast_ln fuse_linear fuse_rope fuse_swiglu fuse_gate_detach_matmul fuse_attn_ffn fuse_ffn "
        "fuse_softmax_mask use_flash_attention use_recompute recompute recompute_granularity sequence_parallel tensor_parallel_degree "
        "tensor_parallel_output disable_ffn_model_parallel moe_gate moe_group moe_group_experts moe_all_to_all_dropout "
        "moe_use_size_all2all moe_fuse_experts enable_mtp_magic_send weight_share_add_bias ignored_index max_sequence_length"
    ),
    "training": (
        "initializer_range router_aux_loss_coef moe_capacity moe_aux_loss_lambda moe_group_orthogonal_loss moe_orthogonal_loss_lambda "
        "moe_z_loss_lambda moe_dropout_prob moe_reverse_token_drop attention_probs_dropout_prob hidden_dropout_prob attention_dropout "
        "multi_token_pred_lambda"
    ),
}
# Keys whose one supported value is known; any other value is a network that this code does not compute.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "compression_ratio": (1.0,),
    "moe_use_aux_free": (True,),
    "moe_gate_act": ("softmax",),
    "scoring_func": ("softmax",),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "use_qk_norm": (False,),
    "moe_layer_feed_fake_token": (False,),
}
_READ = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size rope_theta "
    "rope_parameters rms_norm_eps max_position_embeddings tie_word_embeddings use_bias num_nextn_predict_layers bos_token_id eos_token_id "
    "pad_token_id moe_num_experts num_experts moe_k num_experts_per_tok moe_intermediate_size moe_num_shared_experts "
    "moe_layer_start_index moe_layer_end_index moe_layer_interval moe_norm_min quantization_config"
)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts: `num_experts` routed ones of width `expert_size`, `top_k` per token, and `num_shared` for every token.

    The shared experts are one SwiGLU of width `num_shared * expert_size`. Layer i is an expert layer iff
    `first_layer <= i <= last_layer` and `(i + 1) % interval == 0`.
    """

    num_experts: int
    top_k: int
    expert_size: int
    num_shared: int
    first_layer: int
    last_layer: int
    interval: int = 1
    norm_min: float = 1e-12

    @property
    def shared_size(self) -> int:
        """Width of the shared SwiGLU; 0 when there is none."""
        return self.num_shared * self.expert_size


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """One text decoder. `experts` is None for a dense model; `num_mtp` counts multi-token prediction blocks, 0 or 1."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    max_positions: int = 131_072
    tie_embeddings: bool = True
    use_bias: bool = False
    head_bias: bool = False
    """With use_bias the expert family has a bias on the head too, tied or not; the dense family has none. No release uses either."""
    experts: ExpertsConfig | None = None
    num_mtp: int = 0
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self)

    @property
    def eos_id(self) -> int:
        """The first end-of-sequence id."""
        return self.eos_ids[0]

    @property
    def query_size(self) -> int:
        """Width of all query heads together; it need not equal `hidden_size`."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_size

    def is_expert_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) routes to experts rather than through one dense SwiGLU."""
        e = self.experts
        return e is not None and e.first_layer <= layer <= e.last_layer and (layer + 1) % e.interval == 0

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], where: str = "config.json") -> "TextConfig":
        """Read a Hugging Face or Paddle `config.json` of the text family.

        Raises `CheckpointError` for another family, an unknown key, a value outside what this code computes, or a missing size.
        """
        kind = data.get("model_type")
        if kind in VISION_TYPES:
            raise CheckpointError(f"{where}: model_type '{kind}' is a vision-language model and not of the text family")
        if kind not in _TEXT_TYPES:
            raise CheckpointError(f"{where}: model_type '{kind}' is not of the ERNIE 4.5 family; supported: {', '.join(_TEXT_TYPES)}")
        _refuse_unknown(data, where)
        heads = _whole(data, "num_attention_heads", where)
        hidden = _whole(data, "hidden_size", where)
        layers = _whole(data, "num_hidden_layers", where)
        experts = _experts_from_hf(data, layers, where) if _is_experts(data) else None
        if kind == EXPERTS_TYPE and experts is None:
            raise CheckpointError(f"{where}: model_type '{kind}' needs moe_num_experts of at least 1")
        head_size = data.get("head_dim")
        if head_size is None and hidden % heads:
            raise CheckpointError(f"{where}: hidden_size {hidden} is no multiple of num_attention_heads {heads} and head_dim is not given")
        return cls(
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_whole(data, "num_key_value_heads", where, heads),
            head_size=_whole(data, "head_dim", where) if head_size is not None else hidden // heads,
            ffn_size=_whole(data, "intermediate_size", where),
            vocab_size=_whole(data, "vocab_size", where),
            rope_theta=_rope_theta(data, where),
            norm_eps=float(data.get("rms_norm_eps", 1e-5)),
            max_positions=_whole(data, "max_position_embeddings", where, 131_072),
            # transformers and the original classes both default to tied embeddings; the untied 300B says so in its file or by its tensors
            tie_embeddings=bool(data.get("tie_word_embeddings", True)),
            use_bias=bool(data.get("use_bias") or False),
            head_bias=bool(data.get("use_bias") and experts),
            experts=experts,
            num_mtp=_whole(data, "num_nextn_predict_layers", where, 0, least=0),
            bos_id=_token_id(data, "bos_token_id", 1)[0],
            eos_ids=_token_id(data, "eos_token_id", 2),
            pad_id=_token_id(data, "pad_token_id", 0)[0],
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` content that `from_hf` and transformers read back to the same model."""
        data: dict[str, Any] = {
            "architectures": ["Ernie4_5_MoeForCausalLM" if self.experts else "Ernie4_5ForCausalLM"],
            "model_type": EXPERTS_TYPE if self.experts else DENSE_TYPE,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.ffn_size,
            "vocab_size": self.vocab_size,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_embeddings,
            "use_bias": self.use_bias,
            "hidden_act": "silu",
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_id if len(self.eos_ids) == 1 else list(self.eos_ids),
            "pad_token_id": self.pad_id,
        }
        if self.num_mtp:
            data["num_nextn_predict_layers"] = self.num_mtp
        if self.experts:
            e = self.experts
            data |= {
                "moe_num_experts": e.num_experts,
                "moe_k": e.top_k,
                "moe_intermediate_size": e.expert_size,
                "moe_num_shared_experts": e.num_shared,
                "moe_layer_start_index": e.first_layer,
                "moe_layer_end_index": e.last_layer,
                "moe_layer_interval": e.interval,
                "moe_norm_min": e.norm_min,
                "moe_use_aux_free": True,
            }
        return data


def _check_sizes(c: TextConfig) -> None:
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size", "vocab_size", "max_positions"):
        if getattr(c, name) < 1:
            raise CheckpointError(f"{name} must be at least 1, not {getattr(c, name)}")
    if c.num_heads % c.num_kv_heads:
        raise CheckpointError(
            f"num_heads {c.num_heads} must be a multiple of num_kv_heads {c.num_kv_heads}: each key head serves a whole group"
        )
    if c.head_size % 2:
        raise CheckpointError(f"head_size {c.head_size} must be even: rotary positions turn pairs of dimensions")
    if c.num_mtp not in (0, 1):
        raise CheckpointError(f"num_mtp is {c.num_mtp}; the family has 0 or 1 multi-token prediction blocks")
    e = c.experts
    if e is None:
        return
    if not 1 <= e.top_k <= e.num_experts:
        raise CheckpointError(f"top_k {e.top_k} must lie between 1 and num_experts {e.num_experts}")
    if e.expert_size < 1 or e.num_shared < 0 or e.interval < 1 or e.first_layer < 0:
        raise CheckpointError(
            f"experts of width {e.expert_size}, {e.num_shared} shared, interval {e.interval} from layer {e.first_layer}: not a model"
        )


def _refuse_unknown(data: Mapping[str, Any], where: str) -> None:
    known = set(" ".join((_READ, *WITHOUT_EFFECT.values())).split()) | _ONLY.keys()
    for key, value in data.items():
        if key not in known:
            raise CheckpointError(
                f"{where}: '{key}' is not a setting this version knows, and an unknown setting may change the network; "
                f"delete it if you are sure that it has no effect{did_you_mean(key, known)}"
            )
        if key in _ONLY and value not in _ONLY[key]:
            raise CheckpointError(f"{where}: {key} is {value!r}; this code computes only {' or '.join(map(repr, _ONLY[key]))}")
    if data.get("quantization_config"):
        raise CheckpointError(f"{where}: the checkpoint is quantised (quantization_config); this version reads float checkpoints and GGUF")


def _whole(data: Mapping[str, Any], key: str, where: str, default: int | None = None, least: int = 1) -> int:
    value = data.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{where} lacks '{key}'; take the config.json that was published with the weights")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(f"{where}: {key} must be a whole number of at least {least}, not {value!r}")
    return value


def _token_id(data: Mapping[str, Any], key: str, default: int) -> tuple[int, ...]:
    value = data.get(key)
    if value is None:
        return (default,)
    return tuple(value) if isinstance(value, list) else (value,)


def _rope_theta(data: Mapping[str, Any], where: str) -> float:
    parameters = data.get("rope_parameters") or {}
    if parameters.get("rope_type", "default") != "default":
        raise CheckpointError(f"{where}: rope_type '{parameters['rope_type']}' is not computed here; the ERNIE 4.5 family uses 'default'")
    theta = parameters.get("rope_theta", data.get("rope_theta"))
    if theta is None:
        raise CheckpointError(f"{where} lacks 'rope_theta'; the released models use 500000")
    return float(theta)


def _is_experts(data: Mapping[str, Any]) -> bool:
    return bool(data.get("moe_num_experts") or data.get("num_experts"))


def _experts_from_hf(data: Mapping[str, Any], layers: int, where: str) -> ExpertsConfig:
    end = data.get("moe_layer_end_index", -1)
    if end is None or end == -1:
        end = layers - 1
    return ExpertsConfig(
        num_experts=_whole(data, "moe_num_experts" if data.get("moe_num_experts") else "num_experts", where),
        top_k=_whole(data, "moe_k" if data.get("moe_k") else "num_experts_per_tok", where),
        expert_size=_whole(data, "moe_intermediate_size", where),
        num_shared=_whole(data, "moe_num_shared_experts", where, 0, least=0),
        first_layer=_whole(data, "moe_layer_start_index", where, 0, least=0),
        # an end index past the last layer is stored in some files and means the last layer
        last_layer=min(end, layers - 1),
        interval=_whole(data, "moe_layer_interval", where, 1),
        norm_min=float(data.get("moe_norm_min", 1e-12)),
    )

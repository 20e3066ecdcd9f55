"""The seeing half of a vision-language model as plain frozen data, and the published files that describe one.

Two forms of `config.json` are read. The original one (`ernie4_5_moe_vl`, as published) is flat: the text decoder's keys, lists of two where
the banks differ (text first, vision second), and a nested `vision_config`. transformers' own (`ernie4_5_vl_moe`) nests `text_config` and
`vision_config`. As for text models, an unknown key is an error. No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ernie45.errors import CheckpointError, ConfigError, did_you_mean
from ernie45.models.config import EXPERTS_TYPE, VISION_TYPES, WITHOUT_EFFECT, TextConfig

ORIGINAL_TYPE, NATIVE_TYPE = VISION_TYPES
PositionRule = Literal["original", "transformers"]
POSITION_RULES: tuple[PositionRule, ...] = ("original", "transformers")

# Keys of either form without effect here, beside those of the text family.
_WITHOUT_EFFECT = (
    "pixel_hidden_size modality_detach max_text_id using_precision_check use_recompute_resampler resampler_fuse_rms_norm "
    "dpo_config token_balance_loss token_balance_seqlen moe_multimodal_dispatch_use_allgather moe_dense_experts_token_type_id "
    "global_aux_loss sinkhorn_2gate sinkhorn_temp moe_norm_gate_logits enable_delay_scale_loss num_acc_steps use_recompute_moe "
    "refined_recompute skip_recompute_ops micro_batch_size use_ep_comm_overlap pp_seg_method add_tail_layers "
    "use_recompute_lm_head use_recompute_loss_fn recompute_use_reentrant use_sparse_flash_attn use_var_len_flash_attn "
    "use_sparse_head_and_loss_fn use_fused_head_and_loss_fn cachekv_quant"
)
_TOWER_WITHOUT_EFFECT = (
    "initializer_range attn_sep vit_first_fwd_bsz vit_num_recompute_layers pp_data_balance recompute use_recompute tensor_parallel_degree "
    "tensor_model_parallel_size"
)
# Keys with one value that is computed here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "rope_3d": (True,),
    "use_temporal_conv": (True,),
    "temporal_conv_size": (2,),
    "mm_vocab_size": (0, None),
    "moe_use_hard_gate": (True,),
    "moe_num_attn_experts": (False,),
    "moe_use_token_type_bias": (False,),
}
_TOWER_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("quick_gelu",), "temporal_merge_size": (2,)}
_IDS = ("image_token_id", "image_start_token_id", "image_end_token_id", "video_token_id", "video_start_token_id", "video_end_token_id")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Tower, resampler, the second bank of experts in every expert layer, and how seen tokens are numbered.

    The tower reads square patches of `patch_size` pixels; the resampler joins `merge` x `merge` patches and 2 frames into one token of the
    decoder. `expert_size` is the width of one vision expert; the bank has as many experts as the text bank. Of the rotary frequencies the
    last `time_frequencies` turn with time, the ones before alternately with row and column. The ids are those of the tokens that stand for
    patches and of the markers around them.
    """

    depth: int = 32
    size: int = 1280
    num_heads: int = 16
    ffn_size: int = 5120
    patch_size: int = 14
    channels: int = 3
    merge: int = 2
    expert_size: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    time_frequencies: int = 20
    position_rule: PositionRule = "original"
    """Where positions go on after a video: behind all three axes, or (`transformers`) behind rows and columns alone."""
    image_id: int = 100_295
    video_id: int = 100_295
    image_start_id: int = 101_304
    image_end_id: int = 101_305
    video_start_id: int = 101_306
    video_end_id: int = 101_307

    def __post_init__(self) -> None:
        for name in ("depth", "size", "num_heads", "ffn_size", "patch_size", "channels", "merge", "expert_size"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"vision {name} must be at least 1, not {getattr(self, name)}")
        if self.size % self.num_heads or self.head_size % 4:
            raise CheckpointError(
                f"a vision tower of width {self.size} with {self.num_heads} heads: the width of a head must be a multiple of 4, "
                "a quarter of it turns with the row and a quarter with the column"
            )
        if self.position_rule not in POSITION_RULES:
            raise ConfigError(f"'{self.position_rule}' is no rule of positions{did_you_mean(self.position_rule, POSITION_RULES)}")

    @property
    def head_size(self) -> int:
        """Width of one head of the tower."""
        return self.size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: channels, rows, columns."""
        return self.channels * self.patch_size**2

    @property
    def joined_size(self) -> int:
        """Width of the patches that become one token, side by side."""
        return self.size * self.merge**2

    @property
    def vision_ids(self) -> frozenset[int]:
        """Tokens that go to the vision experts: placeholders and markers."""
        return self.placeholder_ids | {self.image_start_id, self.image_end_id, self.video_start_id, self.video_end_id}

    @property
    def placeholder_ids(self) -> frozenset[int]:
        """Tokens whose embedding is replaced by what was seen."""
        return frozenset({self.image_id, self.video_id})


@dataclass(frozen=True)
class ModelConfig:
    """What a folder's `config.json` describes: a text decoder, and for a vision-language model its seeing half."""

    text: TextConfig
    vision: VisionConfig | None = None

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read either family. Raises `CheckpointError` as `TextConfig.from_hf` does."""
        kind = data.get("model_type")
        if kind == ORIGINAL_TYPE:
            return _checked(_from_original(data, where), where)
        if kind == NATIVE_TYPE:
            return _checked(_from_native(data, where), where)
        return cls(TextConfig.from_hf(data, where))

    def to_hf(self, *, original: bool = False) -> dict[str, Any]:
        """The `config.json` content; `original` gives a vision-language model the published flat form instead of transformers' own."""
        if self.vision is None:
            return self.text.to_hf()
        return _to_original(self.text, self.vision) if original else _to_native(self.text, self.vision)


def _checked(config: ModelConfig, where: str) -> ModelConfig:
    text, vision = config.text, config.vision
    assert vision is not None
    if text.experts is None:
        raise CheckpointError(f"{where}: a vision-language model needs moe_num_experts of at least 1 in each bank")
    alternating = text.head_size // 2 - vision.time_frequencies
    if alternating < 0 or alternating % 2:
        raise CheckpointError(
            f"{where}: of {text.head_size // 2} rotary frequencies {vision.time_frequencies} are kept for time; an even number must be "
            "left for rows and columns (mrope_section, freq_allocation)"
        )
    return config


def _from_original(data: Mapping[str, Any], where: str) -> ModelConfig:
    tower = _mapping(data, "vision_config", where)
    _refuse(data, _ONLY, where)
    text: dict[str, Any] = {
        key: value
        for key, value in data.items()
        if key not in _WITHOUT_EFFECT.split()
        and key not in _ONLY
        and key not in ("vision_config", "im_patch_id", "freq_allocation", "spatial_conv_size", "rope_scaling", *_IDS)
    }
    scaling = _rope_scaling(data, where)
    layers = text.get("num_hidden_layers")
    for key in ("moe_layer_start_index", "moe_layer_end_index", "moe_k", "moe_num_experts"):
        if key in text:
            text[key] = _same(text[key], key, layers if key == "moe_layer_end_index" else None, where)
    text["moe_intermediate_size"], expert_size = _two_widths(data, where)
    text["model_type"] = EXPERTS_TYPE
    vision = _tower(tower, where, expert_size)
    if data.get("spatial_conv_size", vision.merge) != vision.merge:
        raise CheckpointError(f"{where}: spatial_conv_size {data['spatial_conv_size']} differs from spatial_merge_size {vision.merge}")
    image = data.get("im_patch_id") or data.get("image_token_id") or vision.image_id  # videos have the same placeholder
    vision = _with_ids(vision, {"image_token_id": image, "video_token_id": image, **data}, where)
    return ModelConfig(_without_head_bias(TextConfig.from_hf(text, where)), replace(vision, time_frequencies=scaling))


def _from_native(data: Mapping[str, Any], where: str) -> ModelConfig:
    known = {"text_config", "vision_config", "tie_word_embeddings", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id"}
    _unknown(data, known | set(_IDS) | _habits(), where)
    text = dict(_mapping(data, "text_config", where))
    layers = text.get("num_hidden_layers", 0)
    text["moe_intermediate_size"], expert_size = _two_widths(text, where)
    if isinstance(layers, int) and not isinstance(layers, bool):
        text |= _expert_layers(text.pop("mlp_layer_types", None), layers, where)
    sections = (text.get("rope_parameters") or {}).get("mrope_section", [22, 22, 20])
    if "rope_parameters" in text:
        text["rope_parameters"] = {key: value for key, value in text["rope_parameters"].items() if key != "mrope_section"}
    text |= {"model_type": EXPERTS_TYPE} | {key: data[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if data.get(key)}
    if "tie_word_embeddings" in data:  # transformers ties by the outer word
        text["tie_word_embeddings"] = data["tie_word_embeddings"]
    vision = _tower(_mapping(data, "vision_config", where), where, expert_size)
    # transformers' conversion gives videos a placeholder of their own
    vision = _with_ids(vision, {"video_token_id": 103_367, **data}, where)
    return ModelConfig(_without_head_bias(TextConfig.from_hf(text, where)), replace(vision, time_frequencies=_time_of(sections, where)))


def _with_ids(vision: VisionConfig, data: Mapping[str, Any], where: str) -> VisionConfig:
    ids = {key: _number(data, key, default, where) for key, default in _ids(vision).items()}
    return replace(
        vision,
        image_id=ids["image_token_id"],
        image_start_id=ids["image_start_token_id"],
        image_end_id=ids["image_end_token_id"],
        video_id=ids["video_token_id"],
        video_start_id=ids["video_start_token_id"],
        video_end_id=ids["video_end_token_id"],
    )


def _without_head_bias(text: TextConfig) -> TextConfig:
    return replace(text, head_bias=False)  # unlike the text family's, whatever use_bias says


def _tower(data: Mapping[str, Any], where: str, expert_size: int) -> VisionConfig:
    where = f"{where}: vision_config"
    _refuse(data, _TOWER_ONLY, where)
    read = {"depth", "embed_dim", "hidden_size", "num_heads", "intermediate_size", "mlp_ratio", "patch_size", "spatial_patch_size"}
    read |= {"in_channels", "in_chans", "spatial_merge_size", "rope_parameters", "rms_norm_eps"}
    _unknown(data, read | _TOWER_ONLY.keys() | set(_TOWER_WITHOUT_EFFECT.split()) | _habits(), where)
    rope = data.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise CheckpointError(f"{where}: rope_type '{rope['rope_type']}' is not computed here; the towers of the family use 'axial'")
    # the original form says embed_dim, and its hidden_size may be another model's default
    size = _number(data, "embed_dim" if "embed_dim" in data else "hidden_size", 1280, where)
    ffn = _number(data, "intermediate_size", int(size * data.get("mlp_ratio", 4)), where)
    return VisionConfig(
        depth=_number(data, "depth", 32, where),
        size=size,
        num_heads=_number(data, "num_heads", 16, where),
        ffn_size=ffn,
        patch_size=_number(data, "patch_size", 14, where),
        channels=_number(data, "in_channels", data.get("in_chans", 3), where),
        merge=_number(data, "spatial_merge_size", 2, where),
        expert_size=expert_size,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        norm_eps=float(data.get("rms_norm_eps", 1e-6)),
    )


def _expert_layers(kinds: object, layers: int, where: str) -> dict[str, int]:
    """The list of layer kinds as first, last and interval; by default all layers but the first route to experts."""
    if kinds is None:
        return {"moe_layer_start_index": 1, "moe_layer_end_index": layers - 1, "moe_layer_interval": 1}
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {"dense", "sparse"}:
        raise CheckpointError(f"{where}: mlp_layer_types must name 'dense' or 'sparse' for each of the {layers} layers")
    found = [i for i, kind in enumerate(kinds) if kind == "sparse"]
    for interval in range(1, layers + 1):
        if found and found == [i for i in range(found[0], found[-1] + 1) if (i + 1) % interval == 0]:
            return {"moe_layer_start_index": found[0], "moe_layer_end_index": found[-1], "moe_layer_interval": interval}
    raise CheckpointError(f"{where}: mlp_layer_types has expert layers {found}, which are not evenly spaced; no model of the family is so")


def _rope_scaling(data: Mapping[str, Any], where: str) -> int:
    """How many frequencies turn with time."""
    scaling = data.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "ernie_3d", "mrope") or set(scaling) - {"rope_type", "type", "mrope_section", "freq_allocation"}:
        raise CheckpointError(f"{where}: rope_scaling is {dict(scaling)!r}; read are mrope_section and freq_allocation")
    if "mrope_section" in scaling:
        return _time_of(scaling["mrope_section"], where)
    return _number({**data, **scaling}, "freq_allocation", 20, where)


def _time_of(sections: object, where: str) -> int:
    whole = isinstance(sections, list | tuple) and all(isinstance(part, int) for part in sections)
    if not whole or len(sections) != 3 or sections[0] != sections[1]:
        raise CheckpointError(f"{where}: mrope_section is {sections!r}; it must be three numbers, as many for rows as for columns")
    return sections[2]


def _two_widths(data: Mapping[str, Any], where: str) -> tuple[int, int]:
    value = data.get("moe_intermediate_size", [1536, 512])
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(width, int) and width > 0 for width in value):
        raise CheckpointError(f"{where}: moe_intermediate_size must be two widths, of text and of vision experts, not {value!r}")
    return value[0], value[1]


def _same(value: object, key: str, layers: object, where: str) -> object:
    """One number out of a list with one entry per bank; an end past the last layer means the last layer."""
    if not isinstance(value, list | tuple):
        return value
    ends = isinstance(layers, int)
    found = {min(entry, layers - 1) if ends and isinstance(entry, int) and entry >= 0 else entry for entry in value}
    if len(found) != 1:
        raise CheckpointError(
            f"{where}: {key} is {list(value)}; both banks must have the same, layers with one bank alone are not computed"
        )
    return found.pop()


def _habits() -> set[str]:
    return set(f"{WITHOUT_EFFECT['provenance']} {WITHOUT_EFFECT['habits of transformers']}".split())


def _number(data: Mapping[str, Any], key: str, default: int, where: str) -> int:
    value = data.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{where}: {key} must be a whole number, not {value!r}")
    return value


def _mapping(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = data.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} lacks '{key}', an object with the sizes of that half of the model")
    return value


def _unknown(data: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise CheckpointError(
                f"{where}: '{key}' is not a setting this version knows, and an unknown setting may change the network; "
                f"delete it if you are sure that it has no effect{did_you_mean(key, known)}"
            )


def _refuse(data: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in only.items():
        if key in data and data[key] not in allowed:
            raise CheckpointError(f"{where}: {key} is {data[key]!r}; this code computes only {' or '.join(map(repr, allowed))}")


def _ids(vision: VisionConfig) -> dict[str, int]:
    return {key: getattr(vision, key.replace("_token", "")) for key in _IDS}


def _to_native(text: TextConfig, vision: VisionConfig) -> dict[str, Any]:
    inner, e = text.to_hf(), text.experts
    assert e is not None
    for key in ("architectures", "rope_theta", "moe_use_aux_free", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"):
        inner.pop(key)
    time = vision.time_frequencies
    half = (text.head_size // 2 - time) // 2
    inner["rope_parameters"]["mrope_section"] = [half, half, time]
    inner |= {
        "model_type": f"{NATIVE_TYPE}_text",
        "moe_intermediate_size": [e.expert_size, vision.expert_size],
        "mlp_layer_types": ["sparse" if text.is_expert_layer(i) else "dense" for i in range(text.num_layers)],
    }
    tower = {
        "model_type": f"{NATIVE_TYPE}_vision",
        "depth": vision.depth,
        "hidden_size": vision.size,
        "num_heads": vision.num_heads,
        "intermediate_size": vision.ffn_size,
        "patch_size": vision.patch_size,
        "in_channels": vision.channels,
        "spatial_merge_size": vision.merge,
        "temporal_merge_size": 2,
        "hidden_act": "quick_gelu",
        "rms_norm_eps": vision.norm_eps,
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
    }
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": NATIVE_TYPE,
        "tie_word_embeddings": text.tie_embeddings,
        **_ids(vision),
        "text_config": inner,
        "vision_config": tower,
    }


def _to_original(text: TextConfig, vision: VisionConfig) -> dict[str, Any]:
    """The flat form. What it has no word for, since all released towers agree on it, is said in transformers' words where it differs."""
    data, e = text.to_hf(), text.experts
    assert e is not None
    data.pop("rope_parameters")
    other: dict[str, Any] = {}
    if int(vision.size * (vision.ffn_size / vision.size)) != vision.ffn_size:
        other["intermediate_size"] = vision.ffn_size
    if vision.norm_eps != 1e-6:
        other["rms_norm_eps"] = vision.norm_eps
    if vision.rope_theta != 10_000.0:
        other["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
    return data | {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": ORIGINAL_TYPE,
        "moe_num_experts": [e.num_experts] * 2,
        "moe_intermediate_size": [e.expert_size, vision.expert_size],
        "moe_layer_start_index": [e.first_layer] * 2,
        "moe_layer_end_index": [e.last_layer] * 2,
        "rope_3d": True,
        "freq_allocation": vision.time_frequencies,
        "spatial_conv_size": vision.merge,
        "temporal_conv_size": 2,
        "pixel_hidden_size": vision.size,
        "im_patch_id": vision.image_id,
        **{key: value for key, value in _ids(vision).items() if key != "image_token_id"},
        "vision_config": {
            "model_type": "DFNRope_vision_transformer",
            "depth": vision.depth,
            "embed_dim": vision.size,
            "hidden_size": vision.size,
            "hidden_act": "quick_gelu",
            "num_heads": vision.num_heads,
            "mlp_ratio": vision.ffn_size / vision.size,
            "patch_size": vision.patch_size,
            "in_channels": vision.channels,
            "spatial_merge_size": vision.merge,
            **other,
        },
    }

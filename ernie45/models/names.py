"""What the tensors of the ERNIE 4.5 family are called in files: four layouts as tables over `weights.rename`.

| layout | where it occurs | what differs from our parameters |
|---|---|---|
| `pt` | published `-PT` folders, transformers' `save_pretrained` | q, k, v and gate, up apart; one file tensor per expert; bias [1, E] |
| `fused` | transformers' `save_pretrained(save_original_format=False)` | as `pt`, with experts stacked and gate and up joined |
| `paddle` | published `-Paddle` folders | every Linear transposed to [in, out]; q, k, v and gate, up joined; experts apart |
| `gguf` | llama.cpp | its own short names; q, k, v and gate, up apart; experts stacked; no MTP |

Vision-language files write the first three the same way, with these differences: routers lie transposed in `pt` too, the second one is
`gate.weight_1`; one selection bias [2, E] holds both banks' rows; experts are counted on, vision experts from E; tower and resampler are
`vision_model` and `resampler_model`. In `fused` both banks have names of their own, and the tower is `vision_tower`.

Which one a folder has is read off its names. Linear matrices are never guessed by shape, except where uploads are known to differ: the
router ([E, D] or [D, E]) and the MTP projection ([D, 2D], in the first 300B-PT upload [2D, D]). A router with as many experts as
width is taken as its layout writes it; the MTP projection is never square.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from ernie45.errors import CheckpointError
from ernie45.models.config import TextConfig
from ernie45.weights.rename import Ignored, NameTable, Rule, fold_names

LAYOUTS = ("pt", "fused", "paddle", "gguf")
PREFIXES = ("model", "ernie", "model.language_model")
TOWERS = ("vision_model", "model.vision_model", "model.vision_tower")
FLOAT32_ENDINGS = (".router.weight", ".router.selection_bias")
"""Parameters that stay float32 whatever the compute type: rounding them changes which experts are chosen."""
_LAYER = "layers.{layer}"


class Layout(NamedTuple):
    """How a folder names its tensors. `prefix` begins the names of the decoder, `tower` those of a vision tower; "" where there is none."""

    name: str
    prefix: str
    tower: str = ""


def name_table(
    config: TextConfig, layout: str | Layout, *, sighted: bool = False, prefix: str | None = None, ignored: Iterable[Ignored] = ()
) -> NameTable:
    """The table of `layout` for a model of `config`; `sighted` for the files of a vision-language model, whatever of it is wanted.

    `prefix` is the first word of body names: `model`, or `ernie` in Paddle files; by default the one that published files have.
    """
    found = layout if isinstance(layout, Layout) else Layout(layout, prefix or "")
    name = found.name
    if sighted:
        usual = {"pt": "model", "fused": "model.language_model", "paddle": "ernie", "gguf": ""}[name]
        rules = _sighted_rules(config, name, found.prefix or usual, found.tower or ("model.vision_tower" if name == "fused" else TOWERS[0]))
    else:
        build = {"pt": _pt_rules, "fused": _fused_rules, "paddle": _paddle_rules, "gguf": _gguf_rules}[name]
        rules = build(config, found.prefix or ("ernie" if name == "paddle" else "model"))
    return NameTable(name, rules, tuple(ignored))


def detect_layout(names: Collection[str], where: str) -> Layout:
    """Layout and prefixes of a safetensors folder by its tensor names. Raises CheckpointError for names of another family."""
    prefix = next((first for first in PREFIXES if f"{first}.embed_tokens.weight" in names), None)
    tower = next((first for first in TOWERS if any(name.startswith(f"{first}.") for name in names)), "")
    if prefix is not None:
        if any(name.endswith(".self_attn.qkv_proj.weight") for name in names):
            return Layout("paddle", prefix, tower)
        if any(name.endswith("experts.gate_up_proj") for name in names):
            return Layout("fused", prefix, tower)
        if any(name.endswith(".self_attn.q_proj.weight") for name in names):
            return Layout("pt", prefix, tower)
    first = ", ".join(text for text, _ in fold_names(sorted(names)[:200])[:4]) or "none"
    raise CheckpointError(
        f"{where}: its tensor names are not of the ERNIE 4.5 family (first: {first}); "
        "expected model.embed_tokens.weight with model.layers.N.self_attn.q_proj.weight (PT), or ernie. with qkv_proj (Paddle)"
    )


def has_mtp(names: Iterable[str]) -> bool:
    """Whether tensors of the multi-token prediction block are among file names."""
    return any(".mtp_" in name for name in names)


def head_name(layout: str) -> str:
    """The file name of a head of its own."""
    return "output.weight" if layout == "gguf" else "lm_head.weight"


def without_mtp(prefix: str) -> Ignored:
    """Leaves the MTP block in the file, because the caller wants it so."""
    return Ignored(f"{prefix}.mtp_*", "the MTP block was left out as asked (mtp=False)")


def without_head(layout: str) -> Ignored:
    """Leaves out a stored head that repeats the embedding of a tied model."""
    return Ignored(head_name(layout), "the head is tied to the embedding and the stored copy equals it")


def without_sight(found: Layout) -> list[Ignored]:
    """Leaves tower, resampler and vision experts in the file, because the caller wants text alone."""
    mlp = f"{found.prefix}.layers.{{layer}}.mlp"
    outer = found.prefix.removesuffix(".language_model")
    patterns = (f"{found.tower or TOWERS[0]}.*", f"{outer}.resampler_model.*", f"{mlp}.gate.weight_1", f"{mlp}.experts.{{expert}}.*")
    return [Ignored(pattern, "it serves pictures, and only text was asked for") for pattern in (*patterns, f"{mlp}.vision_moe.*")]


def _linear(ours: str, *files: str, sizes: tuple[int, ...] | None = None, turned: bool = False) -> list[Rule]:
    """Weight and bias of a Linear or LayerNorm; only a Linear's weight is ever transposed."""
    return [
        Rule(ours=f"{ours}.weight", files=tuple(f"{file}.weight" for file in files), sizes=sizes, turned=turned),
        Rule(ours=f"{ours}.bias", files=tuple(f"{file}.bias" for file in files), sizes=sizes),
    ]


def _one(ours: str, file: str) -> Rule:
    return Rule(ours=ours, files=(file,))


def _qkv_sizes(config: TextConfig) -> tuple[int, int, int]:
    return (config.query_size, config.kv_size, config.kv_size)


def _pt_block(config: TextConfig, ours: str, theirs: str) -> list[Rule]:
    """One decoder layer with a dense feed-forward, as PT files have it."""
    attn, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    return [
        _one(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight"),
        *_linear(f"{ours}.attn.qkv", f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj", sizes=_qkv_sizes(config)),
        *_linear(f"{ours}.attn.out", f"{attn}.o_proj"),
        _one(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        *_linear(f"{ours}.ffn.gate_up", f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        *_linear(f"{ours}.ffn.down", f"{mlp}.down_proj"),
    ]


def _pt_ends(config: TextConfig, first: str) -> list[Rule]:
    """Everything of a PT file but the experts."""
    layer, shared = f"{first}.layers.{{layer}}", f"{first}.layers.{{layer}}.mlp.shared_experts"
    return [
        _one("embed.weight", f"{first}.embed_tokens.weight"),
        *_pt_block(config, _LAYER, layer),
        *_linear(f"{_LAYER}.ffn.shared.gate_up", f"{shared}.gate_proj", f"{shared}.up_proj"),
        *_linear(f"{_LAYER}.ffn.shared.down", f"{shared}.down_proj"),
        Rule(ours=f"{_LAYER}.ffn.router.weight", files=(f"{layer}.mlp.gate.weight",), either_way=True),
        _one("norm.weight", f"{first}.norm.weight"),
        _one("head.weight", "lm_head.weight"),
        _one("head_bias", "lm_head.bias"),
        *_mtp_ends(first, turned=False),
        *_pt_block(config, "mtp.block", f"{first}.mtp_block.0"),
    ]


def _mtp_ends(first: str, *, turned: bool) -> list[Rule]:
    return [
        _one("mtp.embed_norm.weight", f"{first}.mtp_emb_norm.0.weight"),
        _one("mtp.hidden_norm.weight", f"{first}.mtp_hidden_norm.0.weight"),
        Rule(ours="mtp.project.weight", files=(f"{first}.mtp_linear_proj.0.weight",), turned=turned, either_way=True),
    ]


def _pt_rules(config: TextConfig, first: str) -> list[Rule]:
    mlp = f"{first}.layers.{{layer}}.mlp"
    one = f"{mlp}.experts.{{expert}}"
    return [
        *_pt_ends(config, first),
        Rule(ours=f"{_LAYER}.ffn.router.selection_bias", files=(f"{mlp}.moe_statics.e_score_correction_bias",), row=0),
        Rule(ours=f"{_LAYER}.ffn.experts.gate_up", files=(f"{one}.gate_proj.weight", f"{one}.up_proj.weight"), axis=1),
        Rule(ours=f"{_LAYER}.ffn.experts.down", files=(f"{one}.down_proj.weight",), axis=1),
    ]


def _fused_rules(config: TextConfig, first: str) -> list[Rule]:
    mlp = f"{first}.layers.{{layer}}.mlp"
    return [
        *_pt_ends(config, first),
        Rule(ours=f"{_LAYER}.ffn.router.selection_bias", files=(f"{mlp}.gate.moe_statics.e_score_correction_bias",), row=0),
        _one(f"{_LAYER}.ffn.experts.gate_up", f"{mlp}.experts.gate_up_proj"),
        _one(f"{_LAYER}.ffn.experts.down", f"{mlp}.experts.down_proj"),
    ]


def _paddle_block(ours: str, theirs: str) -> list[Rule]:
    """One decoder layer with a dense feed-forward: columns q|k|v and gate|up lie in our order, so each matrix is ours transposed."""
    return [
        _one(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight"),
        *_linear(f"{ours}.attn.qkv", f"{theirs}.self_attn.qkv_proj", turned=True),
        *_linear(f"{ours}.attn.out", f"{theirs}.self_attn.o_proj", turned=True),
        _one(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        *_linear(f"{ours}.ffn.gate_up", f"{theirs}.mlp.up_gate_proj", turned=True),
        *_linear(f"{ours}.ffn.down", f"{theirs}.mlp.down_proj", turned=True),
    ]


def _paddle_rules(config: TextConfig, first: str) -> list[Rule]:
    layer = f"{first}.layers.{{layer}}"
    one, shared = f"{layer}.mlp.experts.{{expert}}", f"{layer}.mlp.shared_experts"
    return [
        _one("embed.weight", f"{first}.embed_tokens.weight"),
        *_paddle_block(_LAYER, layer),
        *_linear(f"{_LAYER}.ffn.shared.gate_up", f"{shared}.up_gate_proj", turned=True),
        *_linear(f"{_LAYER}.ffn.shared.down", f"{shared}.down_proj", turned=True),
        Rule(ours=f"{_LAYER}.ffn.router.weight", files=(f"{layer}.mlp.gate.weight",), turned=True, either_way=True),
        Rule(ours=f"{_LAYER}.ffn.router.selection_bias", files=(f"{layer}.mlp.moe_statics.e_score_correction_bias",), row=0),
        Rule(ours=f"{_LAYER}.ffn.experts.gate_up", files=(f"{one}.up_gate_proj.weight",), axis=1, turned=True),
        Rule(ours=f"{_LAYER}.ffn.experts.down", files=(f"{one}.down_proj.weight",), axis=1, turned=True),
        _one("norm.weight", f"{first}.norm.weight"),
        Rule(ours="head.weight", files=("lm_head.weight",), turned=True),
        _one("head_bias", "lm_head.bias"),
        *_mtp_ends(first, turned=True),
        *_paddle_block("mtp.block", f"{first}.mtp_block.0"),
    ]


def _sighted_rules(config: TextConfig, layout: str, first: str, tower: str) -> list[Rule]:
    """The rules of a vision-language model's files: those of the text family, the routers and experts of two banks, tower and resampler."""
    assert config.experts is not None
    body = {"pt": _pt_rules, "fused": _fused_rules, "paddle": _paddle_rules, "gguf": _gguf_rules}[layout](config, first)
    if layout == "gguf":  # llama.cpp has no names for these models
        return body
    rules = [rule for rule in body if ".ffn.router." not in rule.ours and ".ffn.experts." not in rule.ours]
    mlp = f"{first}.layers.{{layer}}.mlp"
    for row, (ours, bank) in enumerate(((f"{_LAYER}.ffn", "text_moe"), (f"{_LAYER}.ffn.vision", "vision_moe"))):
        if layout == "fused":
            rules += _stacked_bank(ours, f"{mlp}.{bank}")
        else:
            rules += _counted_bank(ours, mlp, row, row * config.experts.num_experts, turned=layout == "paddle")
    outer = first.removesuffix(".language_model")
    return [*rules, *_tower_rules(tower, turned=layout == "paddle"), *_resampler_rules(f"{outer}.resampler_model", layout)]


def _stacked_bank(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(ours=f"{ours}.router.weight", files=(f"{theirs}.gate.weight",), either_way=True),
        Rule(ours=f"{ours}.router.selection_bias", files=(f"{theirs}.gate.moe_statics.e_score_correction_bias",), row=0),
        _one(f"{ours}.experts.gate_up", f"{theirs}.experts.gate_up_proj"),
        _one(f"{ours}.experts.down", f"{theirs}.experts.down_proj"),
    ]


def _counted_bank(ours: str, mlp: str, row: int, start: int, *, turned: bool) -> list[Rule]:
    """One bank of two in files that count the experts of both on: its row of the bias, its experts from `start` on."""
    one = f"{mlp}.experts.{{expert}}"
    parts = (f"{one}.up_gate_proj.weight",) if turned else (f"{one}.gate_proj.weight", f"{one}.up_proj.weight")
    gate = f"{mlp}.gate.weight" + ("_1" if row else "")
    return [
        Rule(ours=f"{ours}.router.weight", files=(gate,), turned=True, either_way=True),
        Rule(ours=f"{ours}.router.selection_bias", files=(f"{mlp}.moe_statics.e_score_correction_bias",), row=row, rows=2),
        Rule(ours=f"{ours}.experts.gate_up", files=parts, axis=1, first=start, turned=turned),
        Rule(ours=f"{ours}.experts.down", files=(f"{one}.down_proj.weight",), axis=1, first=start, turned=turned),
    ]


def _tower_rules(theirs: str, *, turned: bool) -> list[Rule]:
    ours, block, files = "sight.tower", "sight.tower.blocks.{block}", f"{theirs}.blocks.{{block}}"
    return [
        Rule(ours=f"{ours}.patches.weight", files=(f"{theirs}.patch_embed.proj.weight",), turned=turned),
        *_linear(f"{block}.attn_norm", f"{files}.norm1"),
        *_linear(f"{block}.attn.qkv", f"{files}.attn.qkv", turned=turned),
        *_linear(f"{block}.attn.out", f"{files}.attn.proj", turned=turned),
        *_linear(f"{block}.ffn_norm", f"{files}.norm2"),
        *_linear(f"{block}.up", f"{files}.mlp.fc1", turned=turned),
        *_linear(f"{block}.down", f"{files}.mlp.fc2", turned=turned),
        *_linear(f"{ours}.norm", f"{theirs}.ln"),
    ]


def _resampler_rules(theirs: str, layout: str) -> list[Rule]:
    turned = layout == "paddle"
    first, second, norm = ("fc1", "fc2", "ln") if layout == "fused" else ("0", "2", "3")
    rules = []
    for part in ("spatial", "temporal"):
        ours, files = f"sight.resampler.{part}", f"{theirs}.{part}_linear"
        rules += _linear(f"{ours}.first", f"{files}.{first}", turned=turned)
        rules += _linear(f"{ours}.second", f"{files}.{second}", turned=turned)
        rules += _linear(f"{ours}.norm", f"{files}.{norm}")
    rules += _linear("sight.resampler.project", f"{theirs}.mlp", turned=turned)
    return [*rules, _one("sight.resampler.norm.weight", f"{theirs}.after_norm.weight")]


def _gguf_rules(config: TextConfig, first: str) -> list[Rule]:
    """llama.cpp's names for `ernie4_5` and `ernie4_5-moe`; adjacent-pair rotation is its "norm" kind, so q and k rows keep their order."""
    blk = "blk.{layer}"
    return [
        _one("embed.weight", "token_embd.weight"),
        _one(f"{_LAYER}.attn_norm.weight", f"{blk}.attn_norm.weight"),
        *_linear(f"{_LAYER}.attn.qkv", f"{blk}.attn_q", f"{blk}.attn_k", f"{blk}.attn_v", sizes=_qkv_sizes(config)),
        *_linear(f"{_LAYER}.attn.out", f"{blk}.attn_output"),
        _one(f"{_LAYER}.ffn_norm.weight", f"{blk}.ffn_norm.weight"),
        *_linear(f"{_LAYER}.ffn.gate_up", f"{blk}.ffn_gate", f"{blk}.ffn_up"),
        *_linear(f"{_LAYER}.ffn.down", f"{blk}.ffn_down"),
        *_linear(f"{_LAYER}.ffn.shared.gate_up", f"{blk}.ffn_gate_shexp", f"{blk}.ffn_up_shexp"),
        *_linear(f"{_LAYER}.ffn.shared.down", f"{blk}.ffn_down_shexp"),
        _one(f"{_LAYER}.ffn.router.weight", f"{blk}.ffn_gate_inp.weight"),
        _one(f"{_LAYER}.ffn.router.selection_bias", f"{blk}.exp_probs_b.bias"),
        Rule(ours=f"{_LAYER}.ffn.experts.gate_up", files=(f"{blk}.ffn_gate_exps.weight", f"{blk}.ffn_up_exps.weight"), axis=1),
        _one(f"{_LAYER}.ffn.experts.down", f"{blk}.ffn_down_exps.weight"),
        _one("norm.weight", "output_norm.weight"),
        _one("head.weight", "output.weight"),
    ]

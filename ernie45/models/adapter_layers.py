"""An adapter's files as layers for some rows of a step (`nn.row_adapters`): any targets, layers and ranks that PEFT writes for the family.

Two ways to write experts are read: a pair per expert (`mlp.experts.3.up_proj`), as the published remote code and `models.adapters` have
them, and PEFT's `target_parameters` on the stacked parameters of transformers (`mlp.experts.lora_A`, all experts in one matrix). Files
come from strangers: sizes are decided from the headers, and whatever is not understood is refused by its name before it is computed.
Letters: I and O in- and output widths, R rank, E experts.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.models.adapter_folder import CONFIG, WEIGHTS
from ernie45.models.config import TextConfig
from ernie45.models.vision_config import ModelConfig
from ernie45.nn.row_adapters import AdapterLayers, ExpertsLowRank, LowRank
from ernie45.weights.safetensors import TensorFiles, open_safetensors

MAX_RANK = 4096
_MAX_CONFIG = 1 << 20
_FACTOR = re.compile(r"base_model\.model\.(?:model\.)?layers\.(0|[1-9]\d{0,4})\.([A-Za-z0-9_.]+)\.lora_([AB])\.weight")
_EXPERT = re.compile(r"mlp\.experts\.(0|[1-9]\d{0,5})\.(gate_proj|up_proj|down_proj)")
_PLAIN = {"use_dora": "DoRA", "fan_in_fan_out": "transposed layers", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "lora_bias": "biases"}
_EMPTY = ("modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config")
_EMPTY += ("velora_config", "monteclora_config")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a target lies: module, rows `first` and on of `total`, in-width; `stack` for targets of one expert."""

    module: str
    first: int
    rows: int
    total: int
    inputs: int
    stack: str = ""
    expert: int = 0


@dataclass(frozen=True, slots=True)
class _Pair:
    """One target's factors in the file, by name; `experts`: how many lie in them, side by side."""

    target: str
    a: str
    b: str
    rank: int
    place: _Place
    experts: int = 1


@dataclass(frozen=True)
class AdapterSettings:
    """What `adapter_config.json` says of strengths."""

    alpha: float
    rank_root: bool
    alphas: Mapping[str, float]

    def scale(self, target: str, rank: int) -> float:
        """What `B A` of a target is multiplied by."""
        alpha = next((value for name, value in self.alphas.items() if target == name or target.endswith(f".{name}")), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_root else rank)


def read_adapter_layers(folder: Path, config: ModelConfig, dtype: torch.dtype, most_bytes: int) -> tuple[AdapterLayers, int]:
    """The layers of an adapter for a model of `config` that computes in `dtype`, and their bytes. Vision experts count on from the others.

    Raises CheckpointError, naming file and tensor, for what is no LoRA of this model, or larger than `most_bytes`.
    """
    settings = read_settings(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; adapters are read from safetensors only")
    with open_safetensors(path) as files:
        pairs = list(_pairs(files, config, path))
        size = sum(pair.experts * pair.rank * (pair.place.inputs + pair.place.total) for pair in pairs) * dtype.itemsize
        if size > most_bytes:
            raise CheckpointError(f"{path}: the adapter takes {size:,} bytes; all adapters together have {most_bytes:,}")
        return _layers(pairs, files, settings, dtype, path), size


def read_settings(path: Path) -> AdapterSettings:
    """The settings of a PEFT folder. Raises CheckpointError for what is not plain LoRA."""
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise CheckpointError(f"{path}: is too large to be an adapter's settings")
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; is this a PEFT adapter folder?") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        kind = data.get("peft_type") if isinstance(data, dict) else None
        raise CheckpointError(f"{path}: peft_type is {kind!r}; only LORA is read")
    for key, name in _PLAIN.items():
        if data.get(key):
            raise CheckpointError(f"{path}: {key} is {data[key]!r}; {name} cannot be served here; merge the adapter into the model instead")
    for key in _EMPTY:
        if data.get(key):
            raise CheckpointError(f"{path}: {key} is set, which plain LoRA has not; merge the adapter into the model instead")
    if data.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {data['bias']!r}; adapters that train biases are not read")
    alphas = data.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise CheckpointError(f"{path}: alpha_pattern is no table")
    return AdapterSettings(
        alpha=_strength(data.get("lora_alpha"), path, "lora_alpha"),
        rank_root=bool(data.get("use_rslora")),
        alphas={_literal(name, path): _strength(value, path, "alpha_pattern") for name, value in alphas.items()},
    )


def _strength(value: Any, path: Path, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{path}: {where} must be a number, not {value!r}")
    return float(value)


def _literal(pattern: str, path: Path) -> str:
    """A pattern that names an ending, as PEFT writes it itself. Others would be expressions of strangers that run here."""
    name = pattern.removeprefix("^").removesuffix("$").removeprefix(r".*\.").replace(r"\.", ".")
    if not re.fullmatch(r"[A-Za-z0-9_.]{1,200}", name):
        raise CheckpointError(f"{path}: alpha_pattern holds the expression {pattern[:80]!r}; read are names of modules and their endings")
    return name


def _pairs(files: TensorFiles, config: ModelConfig, path: Path) -> Iterator[_Pair]:
    """Every tensor of the file in its pair, each pair where it belongs."""
    names: dict[tuple[int, str], dict[str, str]] = {}
    for name in files.names():
        found = _FACTOR.fullmatch(name)
        if ".vision_model." in name or ".resampler_model." in name:
            raise CheckpointError(
                f"{path}: {name[:200]} changes what all requests see with; serve the model that the adapter was merged into (`ernie export "
                "MODEL --adapter FOLDER --format folder`, or the run's `model/`)"
            )
        if found is None:
            raise CheckpointError(
                f"{path}: {name[:200]} is no LoRA factor of a layer; embeddings, heads and magnitudes cannot be served here"
            )
        names.setdefault((int(found[1]), found[2]), {})[found[3]] = name
    if not names:
        raise CheckpointError(f"{path}: holds no tensors")
    for (layer, target), factors in names.items():
        shown = f"layer {layer}, {target}"
        if set(factors) != {"A", "B"}:
            raise CheckpointError(f"{path}: {shown} has lora_{''.join(factors)} and not its counterpart")
        if layer >= config.text.num_layers:
            raise CheckpointError(f"{path}: {shown}: this model has {config.text.num_layers} layers")
        yield _pair(files, config, layer, target, factors, f"{path}: {shown}")


def _pair(files: TensorFiles, config: ModelConfig, layer: int, target: str, factors: Mapping[str, str], where: str) -> _Pair:
    a, b = files.info(factors["A"]), files.info(factors["B"])
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point and len(a.shape) == len(b.shape) == 2):
        raise CheckpointError(f"{where}: factors are matrices of floats, not {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
    stacked = target in ("mlp.experts", "mlp.experts.base_layer")
    place = _stack(config.text, layer, a.shape[1], b.shape[0]) if stacked else _place(config, layer, target)
    if place is None and config.vision is None and _EXPERT.fullmatch(target) and config.text.is_expert_layer(layer):
        raise CheckpointError(
            f"{where}: this model has no such expert; numbers from that of its experts on mean vision experts, which it was loaded without"
        )
    if place is None:
        raise CheckpointError(f"{where}: this model has no such layer, or none of shape [{b.shape[0]}, {a.shape[1]}]")
    experts = config.text.experts.num_experts if stacked and config.text.experts is not None else 1
    rank, rest = divmod(a.shape[0], experts)
    if rest or a.shape[0] != b.shape[1] or not 1 <= rank <= MAX_RANK:
        raise CheckpointError(f"{where}: A {list(a.shape)} and B {list(b.shape)} have no common rank of 1 to {MAX_RANK}")
    if (b.shape[0], a.shape[1]) != (place.rows, place.inputs):
        raise CheckpointError(
            f"{where}: A {list(a.shape)} and B {list(b.shape)} change a matrix [{b.shape[0]}, {a.shape[1]}]; "
            f"this model's is [{place.rows}, {place.inputs}]"
        )
    named = f"layers.{layer}.{target}" if not stacked else f"layers.{layer}.mlp.experts.{place.stack}_proj"
    return _Pair(named, a.name, b.name, rank, place, experts)


def _stack(config: TextConfig, layer: int, inputs: int, outputs: int) -> _Place | None:
    """Which of the two stacks a stacked adapter is for; its name depends on the order of training, its shape does not."""
    e = config.experts
    if e is None or not config.is_expert_layer(layer):
        return None
    module = f"layers.{layer}.ffn.experts"
    for stack, rows, width in (("gate_up", 2 * e.expert_size, config.hidden_size), ("down", config.hidden_size, e.expert_size)):
        if (rows, width) == (outputs, inputs):
            return _Place(module, 0, rows, rows, width, stack)
    return None


def _place(model: ModelConfig, layer: int, target: str) -> _Place | None:
    """Where a target of a layer lies; None for one that the model has not."""
    config = model.text
    D, first = config.hidden_size, f"layers.{layer}."
    query, kv = config.query_size, config.kv_size
    places = {
        "self_attn.q_proj": _Place(first + "attn.qkv", 0, query, query + 2 * kv, D),
        "self_attn.k_proj": _Place(first + "attn.qkv", query, kv, query + 2 * kv, D),
        "self_attn.v_proj": _Place(first + "attn.qkv", query + kv, kv, query + 2 * kv, D),
        "self_attn.o_proj": _Place(first + "attn.out", 0, D, D, query),
    }
    e = config.experts
    if e is None or not config.is_expert_layer(layer):
        places |= _feed_forward("mlp.", first + "ffn", D, config.ffn_size)
        return places.get(target)
    places["mlp.gate"] = _Place(first + "ffn.router", 0, e.num_experts, e.num_experts, D)
    if e.shared_size:
        places |= _feed_forward("mlp.shared_experts.", first + "ffn.shared", D, e.shared_size)
    if (found := _EXPERT.fullmatch(target)) is None:
        return places.get(target)
    (bank, expert), part = divmod(int(found[1]), e.num_experts), found[2]
    if bank > 1 or (bank and model.vision is None):
        return None
    module, inner = f"{first}ffn.experts", e.expert_size
    if bank and model.vision is not None:
        module, inner = f"{first}ffn.vision.experts", model.vision.expert_size
    if part == "down_proj":
        return _Place(module, 0, D, D, inner, "down", expert)
    return _Place(module, inner if part == "up_proj" else 0, inner, 2 * inner, D, "gate_up", expert)


def _feed_forward(file: str, module: str, size: int, inner: int) -> dict[str, _Place]:
    return {
        f"{file}gate_proj": _Place(f"{module}.gate_up", 0, inner, 2 * inner, size),
        f"{file}up_proj": _Place(f"{module}.gate_up", inner, inner, 2 * inner, size),
        f"{file}down_proj": _Place(f"{module}.down", 0, size, size, inner),
    }


def _layers(pairs: list[_Pair], files: TensorFiles, settings: AdapterSettings, dtype: torch.dtype, path: Path) -> AdapterLayers:
    """The pairs of each matrix as one: their A below each other, their B where their rows are."""
    parts: dict[tuple[str, str, int], list[tuple[_Place, Tensor, Tensor]]] = {}
    for pair in pairs:
        a_RI, b_OR = (files.read(name).to(torch.float32) for name in (pair.a, pair.b))
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise CheckpointError(f"{path}: {pair.target} holds values that are no finite numbers")
        b_OR = b_OR * settings.scale(pair.target, pair.rank)
        place = pair.place
        if pair.experts == 1:
            parts.setdefault((place.module, place.stack, place.expert), []).append((place, a_RI, b_OR))
            continue
        for expert, (a, b) in enumerate(zip(a_RI.chunk(pair.experts), b_OR.view(len(b_OR), pair.rank, -1).unbind(-1), strict=True)):
            parts.setdefault((place.module, place.stack, expert), []).append((place, a, b))
    layers: dict[str, LowRank | ExpertsLowRank] = {}
    for (module, stack, expert), found in parts.items():
        joined = _joined(found, dtype)
        if not stack:
            layers[module] = joined
            continue
        experts = layers.setdefault(module, ExpertsLowRank({}, {}))
        assert isinstance(experts, ExpertsLowRank)
        (experts.gate_up if stack == "gate_up" else experts.down)[expert] = joined
    return layers


def _joined(found: list[tuple[_Place, Tensor, Tensor]], dtype: torch.dtype) -> LowRank:
    a_RI = torch.cat([a for _, a, _ in found])
    b_OR = torch.zeros(found[0][0].total, len(a_RI))
    start = 0
    for place, _, b in found:
        b_OR[place.first : place.first + place.rows, start : start + b.shape[1]] += b
        start += b.shape[1]
    return LowRank(a_RI.to(dtype, copy=True), b_OR.to(dtype, copy=True))

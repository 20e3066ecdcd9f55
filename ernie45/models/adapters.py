"""Adapters as files: PEFT's folder (`adapter_config.json`, `adapter_model.safetensors`) and back, exactly.

Every matrix has the name that the published PT layout gives it: `...self_attn.q_proj.lora_A.weight`, `...experts.3.up_proj.lora_B.weight`.
Vision experts are counted on behind the text experts, tower and resampler are `vision_model` and `resampler_model`; `adapter_config.json`
says in a key of ours that they are there.
Letters: I and O in- and output widths, R rank.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.names import name_table
from ernie45.models.text import Decoder
from ernie45.nn.lora import LoraConfig, LoraLinear, Pair, adapt, adapt_linears, adapters
from ernie45.weights.safetensors import open_safetensors
from ernie45.weights.safetensors_write import SINGLE_NAME, save_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FIRST = "base_model.model.model."
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ALL = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_PARTS = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out": ("self_attn.o_proj",),
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
    "ffn.shared.gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "ffn.shared.down": ("mlp.shared_experts.down_proj",),
}


_VISION = "ernie45_vision"
"""Key of `adapter_config.json`: which parts of a seeing half have adapters."""


def put_adapters(decoder: Decoder, config: LoraConfig, seed: int) -> None:
    """Freeze the decoder and put fresh adapters on the layers that `config` names.

    Raises ConfigError for adapters on a seeing half that the model does not have, or that is packed.
    """
    sight = decoder.sight
    if config.vision != "none" and sight is None:
        raise ConfigError(f"lora.vision is '{config.vision}', and this model reads text alone; leave it out")
    decoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    adapt(decoder.layers, config, generator)
    if config.vision == "all" and sight is not None:
        adapt_linears(sight, config, generator)
        if not adapters(sight):
            raise ConfigError(
                "the vision tower of this model is packed, and adapters beside it are not known here; take --lora.vision experts"
            )


def save_adapter(decoder: Decoder, folder: Path, config: LoraConfig, base_model: str) -> None:
    """Write the adapters of `decoder` as a PEFT folder. Raises CheckpointError when the folder holds weights already."""
    if (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder}: holds an adapter already; choose another folder, or remove it first")
    held = {name: tensor.contiguous() for name, tensor in _tensors(decoder)}
    assert held, "the decoder has no adapters"
    (written,) = save_safetensors(folder, held.items(), shard_bytes=1 << 62)
    assert written.name == SINGLE_NAME
    written.rename(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(_peft_config(config, base_model), indent=2) + "\n", "utf-8")


def load_adapter(decoder: Decoder, folder: Path) -> LoraConfig:
    """Put the adapter of a PEFT folder onto a plain `decoder`. Returns its settings.

    Raises CheckpointError for a kind of adapter that is not read here, or tensors that do not fit the model.
    """
    config = read_adapter_config(folder)
    put_adapters(decoder, config, 0)
    with open_safetensors(folder / WEIGHTS) as files:
        slots = dict(_tensors(decoder))
        missing, strange = sorted(set(slots) - set(files)), sorted(set(files) - set(slots))
        if missing or strange:
            text = "; ".join(
                f"{what} {len(names)}, first {names[0]}" for what, names in (("missing", missing), ("unexpected", strange)) if names
            )
            raise CheckpointError(
                f"{folder / WEIGHTS}: is not an adapter of the layers of this model that its config names: tensors {text}"
            )
        with torch.no_grad():
            for name, place in slots.items():
                tensor = files.read(name)
                if tensor.shape != place.shape:
                    raise CheckpointError(f"{folder / WEIGHTS}: {name} is {list(tensor.shape)}, this model needs {list(place.shape)}")
                place.copy_(tensor)
    return config


def read_adapter_config(folder: Path) -> LoraConfig:
    """The settings in a PEFT folder. Raises CheckpointError for what is neither LoRA nor DoRA."""
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text("utf-8"))
        rank, alpha, targets = int(data["r"]), float(data["lora_alpha"]), data["target_modules"]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; is this a PEFT adapter folder?") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is no PEFT adapter config: {error!r}") from None
    only = {"fan_in_fan_out": False, "bias": "none", "peft_type": "LORA", "rank_pattern": {}, "alpha_pattern": {}}
    for key, value in only.items():
        if data.get(key) not in (value, None):
            raise CheckpointError(f"{path}: {key} is {data[key]!r}, which is not read here; LoRA and DoRA have {value!r}")
    vision = data.get(_VISION, "none")
    if vision not in ("none", "experts", "all"):
        raise CheckpointError(f"{path}: {_VISION} is {vision!r:.40}; read are none, experts and all")
    known: dict[frozenset[str], Literal["all", "attention"]] = {frozenset(_ALL): "all", frozenset(_ATTENTION): "attention"}
    if not isinstance(targets, list) or frozenset(targets) not in known:
        raise CheckpointError(f"{path}: target_modules is {targets!r}; read are {list(_ALL)} and {list(_ATTENTION)}")
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        rslora=bool(data.get("use_rslora")),
        dora=bool(data.get("use_dora")),
        targets=known[frozenset(targets)],
        vision=vision,
    )


def _peft_config(config: LoraConfig, base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.strength,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": list(_ALL if config.targets == "all" else _ATTENTION),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        **({_VISION: config.vision} if config.vision != "none" else {}),
    }


def _tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of the file; the values are views of our parameters."""
    for name, layer in adapters(decoder).items():
        if name.startswith("sight."):
            assert isinstance(layer, LoraLinear)
            lengths = layer.magnitude.magnitude.split(layer.parts) if layer.magnitude else None
            yield from _named([_sight_file(decoder, name)], layer.pairs(), lengths)
            continue
        _, number, kind = name.split(".", 2)
        first = f"{_FIRST}layers.{number}."
        if isinstance(layer, LoraLinear):
            lengths = layer.magnitude.magnitude.split(layer.parts) if layer.magnitude else None
            yield from _named([first + file for file in _PARTS[kind]], layer.pairs(), lengths)
        else:
            before = layer.base.num_experts if kind == "ffn.vision.experts" else 0
            for parts, stack in ((("gate_proj", "up_proj"), layer.gate_up), (("down_proj",), layer.down)):
                for expert, pairs in enumerate(stack.pairs()):
                    lengths = stack.magnitude.magnitude[expert].chunk(len(parts)) if stack.magnitude else None
                    yield from _named([f"{first}mlp.experts.{before + expert}.{part}" for part in parts], pairs, lengths)


def _sight_file(decoder: Decoder, name: str) -> str:
    """The module of the published files that a linear layer of the seeing half is, as PEFT writes it."""
    layer = decoder.get_submodule(name)
    assert isinstance(layer, LoraLinear)
    shape = {f"{name}.weight": (layer.base.out_size, layer.base.in_size)}
    (piece,) = name_table(decoder.config, "pt", sighted=True).save_plan(shape)
    return f"base_model.model.{piece.file.removesuffix('.weight')}"


def _named(names: list[str], pairs: list[Pair], lengths: Sequence[Tensor] | None) -> Iterator[tuple[str, Tensor]]:
    for n, (name, (a_RI, b_OR)) in enumerate(zip(names, pairs, strict=True)):
        yield f"{name}.lora_A.weight", a_RI.detach()
        yield f"{name}.lora_B.weight", b_OR.detach()
        if lengths is not None:
            yield f"{name}.lora_magnitude_vector", lengths[n].detach()

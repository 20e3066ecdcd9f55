"""Adapters in PEFT's format for tests, written by hand or by PEFT itself."""

import json

import torch
from safetensors.torch import save_file


def targets_of(config, vision=None):
    """Every target of a model and the shape [O, I] of its matrix, as PEFT names them; vision experts count on from the others."""
    D, targets = config.hidden_size, {}
    for layer in range(config.num_layers):
        first = f"layers.{layer}."
        targets |= {
            first + "self_attn.q_proj": (config.query_size, D),
            first + "self_attn.k_proj": (config.kv_size, D),
            first + "self_attn.v_proj": (config.kv_size, D),
            first + "self_attn.o_proj": (D, config.query_size),
        }
        if not config.is_expert_layer(layer):
            targets |= feed_forward(first + "mlp.", D, config.ffn_size)
            continue
        e = config.experts
        targets |= feed_forward(first + "mlp.shared_experts.", D, e.shared_size)
        targets[first + "mlp.gate"] = (e.num_experts, D)
        for n in range(e.num_experts):
            targets |= feed_forward(f"{first}mlp.experts.{n}.", D, e.expert_size)
            targets |= feed_forward(f"{first}mlp.experts.{e.num_experts + n}.", D, vision.expert_size) if vision else {}
    return targets


def feed_forward(first, size, inner):
    return {first + "gate_proj": (inner, size), first + "up_proj": (inner, size), first + "down_proj": (size, inner)}


def settings(rank=2, alpha=4.0, **more):
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [], "bias": "none", **more}


def write(folder, factors, **how):
    """A PEFT folder of factors by target: {target: (A, B)}."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for target, (a, b) in factors.items():
        tensors |= {f"base_model.model.model.{target}.lora_A.weight": a, f"base_model.model.model.{target}.lora_B.weight": b}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings(**how)))
    return folder


def random_factors(config, seed, rank=2, keep=lambda target: True, size=0.3, vision=None):
    generator = torch.Generator().manual_seed(seed)
    return {
        target: (torch.randn(rank, inputs, generator=generator) * size, torch.randn(outputs, rank, generator=generator) * size)
        for target, (outputs, inputs) in targets_of(config, vision).items()
        if keep(target)
    }


def merged(decoder, factors, scale):
    """The decoder's own weights with the adapter added, for the parameters as `Decoder` has them."""
    config = decoder.config
    state = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    for target, (a, b) in factors.items():
        add(state, config, target, scale * b @ a)
    decoder.load_state_dict(state)
    return decoder


def add(state, config, target, delta):
    _, layer, name = target.split(".", 2)
    first = f"layers.{layer}."
    query, kv = config.query_size, config.kv_size
    if name.startswith("self_attn."):
        rows = {"q": slice(0, query), "k": slice(query, query + kv), "v": slice(query + kv, query + 2 * kv)}.get(name[10])
        where = state[first + "attn.out.weight"] if rows is None else state[first + "attn.qkv.weight"][rows]
    elif name == "mlp.gate":
        where = state[first + "ffn.router.weight"]
    elif name.startswith("mlp.experts."):
        _, _, number, part = name.split(".")
        bank, number = divmod(int(number), config.experts.num_experts)
        experts = first + ("ffn.vision.experts" if bank else "ffn.experts")
        where = part_of(state[experts + ".down"], state[experts + ".gate_up"], part, number)
    else:
        inside = "ffn.shared." if "shared_experts" in name else "ffn."
        where = part_of(state[first + inside + "down.weight"], state[first + inside + "gate_up.weight"], name.rpartition(".")[2])
    where += delta


def part_of(down, gate_up, part, number=None):
    if number is not None:
        down, gate_up = down[number], gate_up[number]
    half = len(gate_up) // 2
    return {"gate_proj": gate_up[:half], "up_proj": gate_up[half:], "down_proj": down}[part]

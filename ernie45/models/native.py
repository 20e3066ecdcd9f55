"""A decoder as one native network, where all its matrices are packed or in bfloat16: the engine then computes a step in one call.

A block with a matrix in float32, a bias or a size the kernels do not take leaves the decoder to its own layers, all of it: half a network
in native code would save little. Matrices in bfloat16 are read where they are, by both.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ernie45.models.text import Decoder
from ernie45.nn.attention import Attention
from ernie45.nn.layers import Embedding, Linear, RMSNorm, SwiGLU
from ernie45.nn.moe import Experts, MixtureOfExperts
from ernie45.ops.native import Native
from ernie45.ops.network import ExpertStack, Matrix, Network, NetworkSizes
from ernie45.quant.linear import QuantEmbedding, QuantExperts, QuantLinear


def native_network(decoder: Decoder, kernels: Native, chosen: Mapping[int, Tensor] | None = None) -> Network | None:
    """The network over the decoder's own tensors, or None where it has parts the kernels do not know.

    chosen: of layers with experts, int64 [E] to which it adds how often each was chosen.
    """
    config = decoder.config
    embedding = _matrix(decoder.embed)
    if embedding is None and isinstance(decoder.embed, Embedding) and decoder.embed.weight.dtype == decoder.dtype:
        embedding = decoder.embed.weight.detach()  # rows are looked up in any type
    known = decoder.head_bias is None and config.head_size % 16 == 0 and all(map(_is_known, decoder.layers))
    if not known or embedding is None:
        return None
    sizes = NetworkSizes(config.num_layers, config.vocab_size, config.num_heads, config.num_kv_heads, config.head_size, config.norm_eps)
    network = Network(kernels, sizes, decoder.norm.weight.detach(), decoder.frequencies_P)
    network.set_embedding(embedding)
    head = _matrix(decoder.embed if decoder.head is None else decoder.head)
    if head is not None:
        network.set_head(head)
    for number, block in enumerate(decoder.layers):
        _add(network, number, block, (chosen or {}).get(number))
    return network


def _matrix(module: object) -> Matrix | None:
    """A module's weight, where it is one that the kernels multiply by and all there is to the module."""
    if isinstance(module, QuantEmbedding) or (isinstance(module, QuantLinear) and module.bias is None):
        return module.weight
    if isinstance(module, Embedding) or (type(module) is Linear and module.bias is None):
        return _whole(module.weight)
    return None


def _whole(weight: Tensor) -> Tensor | None:
    return weight.detach() if weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.device.type == "cpu" else None


def _swiglu(module: object) -> tuple[Matrix, Matrix] | None:
    if not isinstance(module, SwiGLU):
        return None
    gate_up, down = _matrix(module.gate_up), _matrix(module.down)
    return (gate_up, down) if gate_up is not None and down is not None and module.gate_up.out_size % 32 == 0 else None


def _stacks(experts: object) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None], int, int] | None:
    """Stacks of routed experts with their scales, their format and the width of one."""
    if isinstance(experts, QuantExperts) and not experts.scheme.code:
        gate_up, down = (experts.gate_up_packed, experts.gate_up_scale), (experts.down_packed, experts.down_scale)
        found = gate_up, down, experts.expert(0)[0].format, experts.expert_size
    elif type(experts) is Experts:
        whole = _whole(experts.gate_up), _whole(experts.down)
        if whole[0] is None or whole[1] is None:
            return None
        found = (whole[0], None), (whole[1], None), 0, experts.down.shape[2]
    else:
        return None
    return found if found[3] % 16 == 0 else None


def _is_known(block: nn.Module) -> bool:
    attn, ffn = block.attn, block.ffn
    if type(attn) is not Attention or _matrix(attn.qkv) is None or _matrix(attn.out) is None:
        return False
    if not isinstance(ffn, MixtureOfExperts):
        return _swiglu(ffn) is not None
    routed = _stacks(ffn.experts) is not None and ffn.router.weight.dtype == ffn.router.selection_bias.dtype == torch.float32
    return routed and (ffn.shared is None or _swiglu(ffn.shared) is not None)


def _add(network: Network, number: int, block: nn.Module, chosen_E: Tensor | None) -> None:
    attn, ffn, norm, ffn_norm = block.attn, block.ffn, block.attn_norm, block.ffn_norm
    assert isinstance(attn, Attention)
    assert isinstance(norm, RMSNorm)
    assert isinstance(ffn_norm, RMSNorm)
    qkv, out = _matrix(attn.qkv), _matrix(attn.out)
    assert qkv is not None
    assert out is not None
    network.set_attention(number, norm.weight.detach(), qkv, out)
    dense = _swiglu(ffn.shared if isinstance(ffn, MixtureOfExperts) else ffn)
    if dense:
        network.set_feed_forward(number, ffn_norm.weight.detach(), *dense)
    if isinstance(ffn, MixtureOfExperts):
        found, router = _stacks(ffn.experts), ffn.router
        assert found is not None
        stack = ExpertStack(router.weight.detach(), router.selection_bias.detach(), *found, router.top_k, router.norm_min, chosen_E)
        network.set_experts(number, ffn_norm.weight.detach(), stack)

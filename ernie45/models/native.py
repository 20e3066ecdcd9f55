"""A decoder as one native network, where all of it is packed: the engine then computes a step in one call.

A block with a float matrix, a bias or a size the kernels do not take leaves the decoder to its own layers, all of it: half a network in
native code would save little.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ernie45.models.text import Decoder
from ernie45.nn.attention import Attention
from ernie45.nn.layers import Embedding, RMSNorm, SwiGLU
from ernie45.nn.moe import MixtureOfExperts
from ernie45.ops import PackedWeight
from ernie45.ops.native import Native
from ernie45.ops.network import ExpertStack, Network, NetworkSizes
from ernie45.quant.linear import QuantEmbedding, QuantExperts, QuantLinear


def native_network(decoder: Decoder, kernels: Native, chosen: Mapping[int, Tensor] | None = None) -> Network | None:
    """The network over the decoder's own tensors, or None where it has parts the kernels do not know.

    chosen: of layers with experts, int64 [E] to which it adds how often each was chosen.
    """
    config = decoder.config
    head = decoder.embed if decoder.head is None else decoder.head
    if decoder.head_bias is not None or config.head_size % 16 or not all(map(_is_packed, decoder.layers)):
        return None
    sizes = NetworkSizes(config.num_layers, config.vocab_size, config.num_heads, config.num_kv_heads, config.head_size, config.norm_eps)
    network = Network(kernels, sizes, decoder.norm.weight, decoder.frequencies_P)
    if isinstance(decoder.embed, QuantEmbedding):
        network.set_embedding(decoder.embed.weight)
    elif isinstance(decoder.embed, Embedding) and decoder.embed.weight.dtype == decoder.dtype:
        network.set_embedding(decoder.embed.weight.detach().contiguous())
    else:
        return None
    if isinstance(head, QuantEmbedding | QuantLinear):
        network.set_head(head.weight)
    for number, block in enumerate(decoder.layers):
        _add(network, number, block, (chosen or {}).get(number))
    return network


def _weight(module: object) -> PackedWeight | None:
    return module.weight if isinstance(module, QuantLinear) and module.bias is None else None


def _swiglu(module: object) -> tuple[PackedWeight, PackedWeight] | None:
    if not isinstance(module, SwiGLU):
        return None
    gate_up, down = _weight(module.gate_up), _weight(module.down)
    return (gate_up, down) if gate_up and down and gate_up.out_size % 32 == 0 else None


def _is_packed(block: nn.Module) -> bool:
    attn, ffn = block.attn, block.ffn
    if not isinstance(attn, Attention) or not (_weight(attn.qkv) and _weight(attn.out)):
        return False
    if not isinstance(ffn, MixtureOfExperts):
        return _swiglu(ffn) is not None
    experts = ffn.experts
    return (
        isinstance(experts, QuantExperts)
        and not experts.scheme.code
        and experts.expert_size % 16 == 0
        and (ffn.shared is None or _swiglu(ffn.shared) is not None)
    )


def _add(network: Network, number: int, block: nn.Module, chosen_E: Tensor | None) -> None:
    attn, ffn, norm, ffn_norm = block.attn, block.ffn, block.attn_norm, block.ffn_norm
    assert isinstance(attn, Attention)
    assert isinstance(norm, RMSNorm)
    assert isinstance(ffn_norm, RMSNorm)
    qkv, out = _weight(attn.qkv), _weight(attn.out)
    assert qkv is not None
    assert out is not None
    network.set_attention(number, norm.weight, qkv, out)
    dense = _swiglu(ffn.shared if isinstance(ffn, MixtureOfExperts) else ffn)
    if dense:
        network.set_feed_forward(number, ffn_norm.weight, *dense)
    if isinstance(ffn, MixtureOfExperts):
        e, router = ffn.experts, ffn.router
        assert isinstance(e, QuantExperts)
        stack = ExpertStack(
            router.weight, router.selection_bias, (e.gate_up_packed, e.gate_up_scale), (e.down_packed, e.down_scale),
            e.expert(0)[0].format, e.expert_size, router.top_k, router.norm_min, chosen_E,
        )  # fmt: skip
        network.set_experts(number, ffn_norm.weight, stack)

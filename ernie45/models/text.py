"""The ERNIE 4.5 text decoder, dense and mixture of experts: what is trained is what is served.

Tokens are packed, there is no batch axis, and attention is an argument (`nn.attention.Attend`). `forward` ends before the final norm, since
the multi-token predictor reads that state and only the rows that are sampled need `logits`. A vision-language model is this decoder with a
second bank of experts in its expert layers and with `sight` beside them; text alone passes it as it passes a text model.
Letters: T tokens, R rows of interest, D width, V vocabulary, S patches, C numbers of one patch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ernie45.errors import RequestError
from ernie45.models.config import TextConfig
from ernie45.models.mtp import MultiTokenPredictor
from ernie45.models.vision import Sight
from ernie45.models.vision_config import ModelConfig, VisionConfig
from ernie45.nn.attention import Attend, Attention, PackedCausal
from ernie45.nn.block import Block
from ernie45.nn.layers import Embedding, Linear, RMSNorm, SwiGLU
from ernie45.nn.moe import MixtureOfExperts, Modality
from ernie45.nn.rope import axes_of_frequencies, inverse_frequencies, turns, turns_of_places


class Decoder(nn.Module):
    """The network of a `TextConfig`; with a `VisionConfig` it sees. Weights are empty until `models.load` or `initialise` fills them."""

    def __init__(self, config: TextConfig, vision: VisionConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.frequencies_P = inverse_frequencies(config.head_size, config.rope_theta)  # no buffer: a cast of the model must not touch it
        self.embed = Embedding(config.vocab_size, config.hidden_size)  # tokens [T] -> [T, D]
        self.layers = nn.ModuleList(
            Block(config.hidden_size, config.norm_eps, _attention(config, i), _ffn(config, i, vision)) for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size)) if config.head_bias else None
        self.mtp = _mtp(config) if config.num_mtp else None
        self.sight = Sight(vision, config.hidden_size, config.norm_eps) if vision else None
        self.axes_P = axes_of_frequencies(config.head_size // 2, vision.time_frequencies if vision else config.head_size // 2)

    @property
    def model_config(self) -> ModelConfig:
        """Its config, and that of its seeing half where it has one."""
        return ModelConfig(self.config, self.sight.config if self.sight is not None else None)

    @property
    def dtype(self) -> torch.dtype:
        """The compute type; the router stays in float32 beside it."""
        return self.norm.weight.dtype

    def forward(self, x_TD: Tensor, positions_T: Tensor, attend: Attend, vision_T: Tensor | None = None) -> Tensor:
        """[T, D] -> the last layer's output [T, D], before the final norm.

        `positions` are [T], or [T, 3] (time, row, column) where tokens of pictures are among them; three equal numbers are the same as one.
        `vision` says which tokens go to the vision experts, bool [T]; None, or no such token, is the text path.
        """
        turns_TP = self.turns(positions_T)
        modality = Modality.of(vision_T)
        for layer in self.layers:
            x_TD = layer(x_TD, turns_TP, attend) if modality is None else layer(x_TD, turns_TP, attend, modality)
        return x_TD

    def turns(self, positions_T: Tensor) -> Tensor:
        """The rotary turns of positions [T] or [T, 3], complex64 [T, P]; every layer of a pass takes the same."""
        if positions_T.dim() == 1:
            return turns(positions_T, self.frequencies_P)
        return turns_of_places(positions_T, self.frequencies_P, self.axes_P)

    @property
    def head_matrix(self) -> Tensor:
        """The output head's weight [V, D]; the embedding's where the two are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, h_RD: Tensor) -> Tensor:
        """Final norm and output head, [R, D] -> [R, V] in the compute type."""
        h_RD = self.norm(h_RD)
        logits_RV = self.embed.scores(h_RD) if self.head is None else self.head(h_RD)
        return logits_RV if self.head_bias is None else logits_RV + self.head_bias

    def predict_after_next(self, next_tokens_T: Tensor, h_TD: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """State of the multi-token predictor, [T, D], for `logits`: row i guesses the token after `next_tokens[i]`.

        `h` is what `forward` returned and `positions` are those of the next tokens. Only models with `config.num_mtp` have the block.
        """
        assert self.mtp is not None, "this model has no multi-token prediction block"
        return self.mtp(self.embed(next_tokens_T), h_TD, self.turns(positions_T), attend)

    @torch.inference_mode()
    def prompt_logits(self, tokens: Sequence[int], pixels: Sequence[tuple[Tensor, Sequence[int]]] = ()) -> Tensor:
        """Logits after every token of one prompt, float32 [T, V], by one whole forward pass without a cache.

        `pixels` are the pictures and videos that the prompt's placeholder tokens stand for, in order: (patches [S, C], (frames, rows,
        columns)) each. Patches are normalised floats in the processor's order, as transformers' `pixel_values`; `Sight.encode` has the
        details. Raises `RequestError` for an empty prompt, one longer than the model's positions, an id outside the vocabulary, pixels that
        do not fit their grids or the placeholders, and for pixels given to a model that does not see.
        """
        check_tokens(tokens, self.config)
        ids_T = torch.tensor(tokens, device=self.norm.weight.device)
        x_TD, attend = self.embed(ids_T), PackedCausal([len(tokens)])
        if self.sight is None:
            if pixels:
                raise RequestError("this model was loaded without its vision tower, or has none; it takes text alone", field="pixels")
            return self.logits(self(x_TD, torch.arange(len(tokens), device=ids_T.device), attend)).float()
        grids = [grid for _, grid in pixels]
        positions_T3 = self.sight.positions(tokens, grids).positions_T3.to(ids_T.device)
        if pixels:
            x_TD = self.sight.put(x_TD, ids_T, torch.cat([self.sight.encode(patches, grid) for patches, grid in pixels]))
        return self.logits(self(x_TD, positions_T3, attend, self.sight.is_vision(ids_T))).float()

    def words(self) -> list[int]:
        """Ids for a prompt of any tokens: all but the first three, which begin and end texts, and those that stand for pictures."""
        seen = frozenset() if self.sight is None else self.sight.config.placeholder_ids
        return [id for id in range(min(3, self.config.vocab_size - 1), self.config.vocab_size) if id not in seen]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, std: float = 0.02) -> "Decoder":
        """Fill the weights to train from nothing: normal with `std`, norms 1, biases and selection bias 0. Returns the decoder."""
        for name, parameter in self.named_parameters():
            fill_initial(name, parameter, generator, std)
        return self


def fill_initial(name: str, parameter: Tensor, generator: torch.Generator, std: float = 0.02) -> Tensor:
    """Give one parameter, in place, what `Decoder.initialise` gives it, and return it."""
    if name.endswith("norm.weight"):
        return parameter.fill_(1.0)
    if name.endswith("bias"):
        return parameter.zero_()
    return parameter.normal_(0.0, std, generator=generator)


def check_tokens(tokens: Sequence[int], config: TextConfig) -> None:
    """Raise `RequestError` unless `tokens` is a non-empty prompt that fits the model's vocabulary and positions."""
    if not len(tokens):
        raise RequestError("the prompt is empty; give at least one token", field="prompt")
    if len(tokens) > config.max_positions:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens, the model reads at most {config.max_positions}; shorten it", field="prompt"
        )
    for place, token in enumerate(tokens):
        if not 0 <= token < config.vocab_size:
            raise RequestError(f"token id {token} at place {place} is outside the vocabulary 0 .. {config.vocab_size - 1}", field="prompt")


def _attention(config: TextConfig, layer: int) -> Attention:
    return Attention(
        layer,
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        bias=config.use_bias,
    )


def _ffn(config: TextConfig, layer: int, vision: VisionConfig | None) -> nn.Module:
    if not config.is_expert_layer(layer):
        return SwiGLU(config.hidden_size, config.ffn_size, bias=config.use_bias)
    e = config.experts
    assert e is not None
    return MixtureOfExperts(
        config.hidden_size,
        num_experts=e.num_experts,
        top_k=e.top_k,
        expert_size=e.expert_size,
        shared_size=e.shared_size,
        shared_bias=config.use_bias,
        norm_min=e.norm_min,
        vision_size=vision.expert_size if vision else 0,
    )


def _mtp(config: TextConfig) -> MultiTokenPredictor:
    # its layer number stands behind the trunk's, so that a paged cache keeps its keys apart; its feed-forward is dense in every release
    dense = SwiGLU(config.hidden_size, config.ffn_size, bias=config.use_bias)
    block = Block(config.hidden_size, config.norm_eps, _attention(config, config.num_layers), dense)
    return MultiTokenPredictor(config.hidden_size, config.norm_eps, block)

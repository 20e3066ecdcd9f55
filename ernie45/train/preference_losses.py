"""DPO and its kin as a table: what each makes of the log-probabilities of a chosen and a rejected answer.

c, r are the policy's log-probabilities of the two answers and c0, r0 the reference's, summed over an answer's tokens;
D = (c - c0) - (r - r0).
Formulas: the published preference code of the ERNIE 4.5 family; papers are named beside each. All vectors are float32 [P], P pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ernie45.errors import ConfigError

LossName = Literal["sigmoid", "hinge", "ipo", "simpo", "dpop", "kto-pair", "sppo", "nca", "orpo", "kto", "reward"]


_BELONGS: dict[str, LossName] = {"smoothing": "sigmoid", "offset": "sigmoid", "desirable": "kto", "undesirable": "kto"}
_BELONGS |= {"margin": "reward", "center": "reward"}


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Which preference loss, and how strong."""

    loss: LossName = "sigmoid"
    """sigmoid is DPO; simpo and orpo need no reference; kto takes single judged answers; reward trains a reward model."""
    beta: float = 0.1
    """How tightly the policy is held to the reference; larger is tighter."""
    smoothing: float = 0.0
    """With sigmoid: probability that a pair is labelled the wrong way round."""
    offset: float = 0.0
    """With sigmoid: how much of a margin a larger judged gap demands."""
    gamma: float = 0.5
    """With simpo: margin that is demanded, divided by beta."""
    positive: float = 50.0
    """With dpop: price of the chosen answer falling below the reference."""
    answer: float = 0.0
    """Weight of the plain loss of the chosen answer beside the preference; 1 is usual with orpo."""
    desirable: float = 1.0
    """With kto: weight of good answers; raise it where they are few."""
    undesirable: float = 1.0
    """With kto: weight of bad answers."""
    margin: float = 0.0
    """With reward: by how much, per judged gap, the rewards of a pair are to differ."""
    center: float = 0.0
    """With reward: weight of the squared sum of a pair's rewards, which keeps them near 0."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "loss"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name == "beta" and value == 0):
                raise ConfigError(f"preference.{name} must be a number {'above' if name == 'beta' else 'of at least'} 0, not {value}")
        if self.smoothing >= 0.5:
            raise ConfigError(f"preference.smoothing must be below 0.5, where labels would say nothing, not {self.smoothing}")
        for name, loss in _BELONGS.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and self.loss != loss:
                raise ConfigError(f"preference.{name} belongs to the loss '{loss}' and does nothing with '{self.loss}'; leave it out")
        if self.answer and self.loss in ("kto", "reward"):
            raise ConfigError(f"preference.answer is for losses of pairs of answers, not for '{self.loss}'; leave it out")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference policy."""
        return self.loss not in ("simpo", "orpo", "reward")


@dataclass(frozen=True)
class Pairs:
    """What a loss is computed from. `c_tokens`, `r_tokens` are the answers' lengths, `gap` how much better the chosen was judged."""

    c: Tensor
    r: Tensor
    c0: Tensor
    r0: Tensor
    c_tokens: Tensor
    r_tokens: Tensor
    gap: Tensor

    @property
    def delta(self) -> Tensor:
        """D: by how much more than the reference the policy prefers the chosen answer."""
        return (self.c - self.c0) - (self.r - self.r0)


def preference_loss(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    """The loss of each pair, [P], with the gradient of the policy's log-probabilities; the plain loss of the answer is not in it."""
    return _LOSSES[config.loss](pairs, config)


def _sigmoid(p: Pairs, config: PreferenceConfig) -> Tensor:
    """DPO (arXiv 2305.18290), with label smoothing (cDPO) and a margin by judged gap (ODPO, 2402.10571)."""
    z = config.beta * p.delta - (config.offset * (p.gap + 1e-6).log() if config.offset else 0.0)
    return -(1 - config.smoothing) * F.logsigmoid(z) - config.smoothing * F.logsigmoid(-z)


def _hinge(p: Pairs, config: PreferenceConfig) -> Tensor:
    """SLiC-HF (2305.10425)."""
    return (1 - config.beta * p.delta).relu()


def _ipo(p: Pairs, config: PreferenceConfig) -> Tensor:
    """IPO (2310.12036), on log-probabilities per token."""
    delta = (p.c - p.c0) / p.c_tokens - (p.r - p.r0) / p.r_tokens
    return (delta - 1 / (2 * config.beta)).square()


def _simpo(p: Pairs, config: PreferenceConfig) -> Tensor:
    """SimPO (2405.14734): per token, without a reference."""
    return -F.logsigmoid(config.beta * (p.c / p.c_tokens - p.r / p.r_tokens) - config.gamma)


def _dpop(p: Pairs, config: PreferenceConfig) -> Tensor:
    """DPO-positive (2402.13228), the price outside the sigmoid as ERNIE's code has it."""
    return -F.logsigmoid(config.beta * p.delta) + config.positive * (p.c0 - p.c).relu()


def _kto_pair(p: Pairs, config: PreferenceConfig) -> Tensor:
    """KTO on pairs (2402.01306): each answer against the batch's mean drift of the other kind, which carries no gradient."""
    c_drift, r_drift = (p.c - p.c0).detach().mean().clamp(min=0), (p.r - p.r0).detach().mean().clamp(min=0)
    chosen = 1 - torch.sigmoid(config.beta * ((p.c - p.c0) - r_drift))
    return chosen + 1 - torch.sigmoid(config.beta * (c_drift - (p.r - p.r0)))


def _sppo(p: Pairs, config: PreferenceConfig) -> Tensor:
    """SPPO with hard labels (2405.00675)."""
    goal = 1 / (2 * config.beta)
    return (p.c - p.c0 - goal).square() + (p.r - p.r0 + goal).square()


def _nca(p: Pairs, config: PreferenceConfig) -> Tensor:
    """NCA on pairs (2402.05369)."""
    chosen, rejected = config.beta * (p.c - p.c0), config.beta * (p.r - p.r0)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _orpo(p: Pairs, config: PreferenceConfig) -> Tensor:
    """ORPO (2403.07691): the odds of the answers, per token, without a reference; beta weighs it beside `answer`."""
    c, r = p.c / p.c_tokens, p.r / p.r_tokens
    return -config.beta * F.logsigmoid((c - r) - (_log_one_minus_exp(c) - _log_one_minus_exp(r)))


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """`log(1 - e^x)` for x < 0, exact near 0 too."""
    return torch.log(-torch.expm1(x.clamp(max=-1e-7)))


_LOSSES: dict[str, Callable[[Pairs, PreferenceConfig], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _simpo,
    "dpop": _dpop,
    "kto-pair": _kto_pair,
    "sppo": _sppo,
    "nca": _nca,
    "orpo": _orpo,
}

"""AdamW and Muon over one model: which parameter gets which rule, float32 masters, clipping, and a moving average of the weights.

The rules by name (they hold on every layer): norms and biases do not decay; routers, of both modalities, learn at `router_rate` times the
rate, the vision tower at `tower_rate` times; with Muon, all matrices but embedding, head, routers and the tower's first are orthogonalised,
each head and each half of a fused matrix by itself.
State is a flat mapping from names to tensors, so that a checkpoint is one file without pickles.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.vision import TowerAttention
from ernie45.parallel.shard import of_matrices, of_numbers, own, total_norm
from ernie45.train.recompute import filed

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients whose iteration drives singular values to about 1 (0.7 to 1.2) in five steps."""


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """How gradients become steps."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon uses AdamW for what is not a hidden matrix."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.1
    """Pull towards 0, times the learning rate; norms and biases have none."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0 switches clipping off."""
    router_rate: float = 1.0
    """Learning rate of the routers, as a multiple."""
    tower_rate: float = 1.0
    """Learning rate of the vision tower, as a multiple."""
    b_rate: float = 1.0
    """Learning rate of the B matrices of LoRA adapters, as a multiple (LoRA+)."""
    momentum: float = 0.95
    """Of Muon."""
    state: Literal["float32", "bfloat16"] = "float32"
    """Type of AdamW's two means. bfloat16 takes half the memory; what it cannot hold is rounded by chance, so that small changes add up."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimiser.{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("eps", "weight_decay", "clip", "router_rate", "tower_rate", "b_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"optimiser.{name} must be a number of at least 0, not {value}")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls on a parameter: on matrices, not on norms, biases, the lengths of rows (DoRA) and learned scales."""
    return parameter.ndim >= 2 and not name.endswith(("norm.weight", "bias", ".magnitude", ".log_scale"))


_NO_HIDDEN_MATRIX = ("embed.weight", "head.weight", "router.weight", "tower.patches.weight")
_NO_HIDDEN_MATRIX += (".adapter_a", ".adapter_b", ".magnitude", ".latent", ".log_scale")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: matrices and stacks of matrices, but embedding, head, routers and adapters."""
    return parameter.ndim >= 2 and not name.endswith(_NO_HIDDEN_MATRIX)


@dataclass
class _Means:
    """Of one parameter: decaying means of its gradient and of the gradient's square, and the steps that are in them."""

    mean: Tensor
    square: Tensor
    steps: int = 0


class Optimiser:
    """One step at a time over the parameters of `model` that want a gradient.

    Parameters in bfloat16 have float32 masters: the optimiser holds what the bfloat16 number lacks of it (`ops.optimise`), the step is
    taken in float32 and rounded back. `head_size` is the rows of one attention head, for Muon's split of fused qkv matrices. `folder` is
    where masters and state are kept, as files that nobody sees; None keeps them in memory.
    """

    def __init__(self, model: nn.Module, config: OptimiserConfig, head_size: int, folder: Path | None = None) -> None:
        self.config, self.head_size = config, head_size
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError("nothing is to be trained: every parameter is frozen")
        assert all(p.dtype in (torch.float32, torch.bfloat16) for p in self.parameters.values()), "models learn in these types alone"
        self._kept: Callable[[Tensor], Tensor] = partial(filed, folder=folder) if folder is not None else torch.clone
        self._low = {name: self._zeros(p, torch.int16) for name, p in self.parameters.items() if p.dtype == torch.bfloat16}
        muon = {name for name, p in self.parameters.items() if config.kind == "muon" and is_hidden_matrix(name, p)}
        towers = {name: part for name, part in model.named_modules() if isinstance(part, TowerAttention)}
        self._tower_heads = {f"{name}.qkv.weight": part.head_size for name, part in towers.items()}
        self._muon = {name: self._zeros(p, torch.float32) for name, p in self.parameters.items() if name in muon}
        self._means: dict[str, _Means] = {}  # of those that have learned

    def _zeros(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return self._kept(torch.zeros_like(like, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format))

    def _decay(self, name: str) -> float:
        return self.config.weight_decay if decays(name, self.parameters[name]) else 0.0

    def _rate(self, name: str, rate: float) -> float:
        if name.endswith("router.weight"):
            return rate * self.config.router_rate
        if "sight.tower." in name:
            rate *= self.config.tower_rate
        return rate * self.config.b_rate if name.endswith(".adapter_b") else rate

    def master(self, name: str) -> Tensor:
        """A parameter in float32, as exactly as it is known; itself where it is float32, else a copy."""
        parameter = self.parameters[name].detach()
        return parameter if name not in self._low else of_numbers(ops.joined, parameter, self._low[name])

    def gradient_norm(self) -> float:
        """Norm of all gradients together; not a number or infinite when any of them is."""
        return total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    @torch.no_grad()
    def step(self, rate: float, norm: float) -> None:
        """Clip by the known `norm`, step at learning rate `rate`, and drop each gradient when its parameter has stepped."""
        assert math.isfinite(norm), "a step with a gradient that is not finite is refused before it comes here"
        scale = min(1.0, self.config.clip / (norm + 1e-6)) if self.config.clip else 1.0
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                take = self._step_muon if name in self._muon else self._step_adamw
                take(name, parameter.grad, self._rate(name, rate), scale)
                parameter.grad = None

    def _step_adamw(self, name: str, gradient: Tensor, rate: float, scale: float) -> None:
        config, parameter, low = self.config, self.parameters[name], self._low.get(name)
        if name not in self._means:
            state = getattr(torch, config.state)
            self._means[name] = _Means(mean=self._zeros(parameter, state), square=self._zeros(parameter, state))
        held = self._means[name]
        held.steps += 1
        numbers = ops.AdamwNumbers(
            scale=scale,
            mean_share=1 - config.beta1,
            square_rest=config.beta2,
            rate=rate / (1 - config.beta1**held.steps),
            root_scale=(1 - config.beta2**held.steps) ** -0.5,
            eps=config.eps,
            decay=rate * self._decay(name),
            step=held.steps,
        )
        ops.adamw(own(parameter), None if low is None else own(low), own(gradient).contiguous(), own(held.mean), own(held.square), numbers)

    def _step_muon(self, name: str, gradient: Tensor, rate: float, scale: float) -> None:
        momentum, gradient = self._muon[name], gradient.float() * scale
        momentum.lerp_(gradient, 1 - self.config.momentum)
        ahead = gradient.lerp(momentum, self.config.momentum)
        rows = matrix_rows(name, tuple(ahead.shape), self._tower_heads.get(name, self.head_size))
        update = of_matrices(lambda whole: orthogonalised(whole.unflatten(-2, (-1, rows))).flatten(-3, -2), ahead)
        # 0.2 sqrt(max side) gives the update the root mean square that AdamW's has, so one learning rate serves both
        master = self.master(name)
        master.mul_(1 - rate * self._decay(name)).add_(update, alpha=-rate * 0.2 * math.sqrt(max(rows, ahead.shape[-1])))
        if name in self._low:
            high, low = ops.parted(own(master))
            own(self.parameters[name]).copy_(high)
            own(self._low[name]).copy_(low)

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything beside the parameters that the next step depends on: `mean/NAME`, `square/NAME`, `steps/NAME`, `low/NAME`, ..."""
        state = {f"momentum/{name}": momentum for name, momentum in self._muon.items()}
        state |= {f"low/{name}": low for name, low in self._low.items()}
        for name, held in self._means.items():
            state |= {f"mean/{name}": held.mean, f"square/{name}": held.square, f"steps/{name}": torch.tensor(float(held.steps))}
        return state

    def blank_state(self, keys: Iterable[str], where: str) -> dict[str, Tensor]:
        """Empty tensors, cut as this rank's are, for the `keys` of another `state`, to be filled and loaded.

        Raises CheckpointError when they are of another model or optimiser.
        """
        types = {"momentum": torch.float32, "low": torch.int16, "mean": getattr(torch, self.config.state)}
        types["square"] = types["mean"]
        blank: dict[str, Tensor] = {}
        for key in keys:
            kind, _, name = key.partition("/")
            if name not in self.parameters or kind not in {*types, "steps"}:
                raise CheckpointError(f"{where}: holds the optimiser state of another model or method: {key}")
            parameter = self.parameters[name]
            blank[key] = torch.zeros(()) if kind == "steps" else torch.zeros_like(parameter, dtype=types[kind], requires_grad=False)
        return blank

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Put back what `state` gave, bit for bit. Raises CheckpointError when it is the state of another model or optimiser."""
        names = {key.partition("/")[2] for key in state}
        kinds = {key.partition("/")[0] for key in state}
        if not names <= set(self.parameters) or not kinds <= {"momentum", "low", "mean", "square", "steps"}:
            strange = sorted(names - set(self.parameters))[:3] or sorted(kinds)
            raise CheckpointError(f"{where}: holds the optimiser state of another model or method: {', '.join(strange)}")
        for name, parameter in self.parameters.items():
            held = {kind: state[key] for kind in kinds if (key := f"{kind}/{name}") in state}
            shaped = all(tensor.shape == parameter.shape for kind, tensor in held.items() if kind != "steps")
            fits = ("momentum" in held) == (name in self._muon) and ("low" in held) == (name in self._low)
            if not shaped or not fits:
                raise CheckpointError(f"{where}: the optimiser state of {name} does not fit this run's model and optimiser")
            if "low" in held:
                self._low[name].copy_(held["low"])
            if "momentum" in held:
                self._muon[name].copy_(held["momentum"])
            elif "mean" in held:
                mean, square = (self._kept(held[kind].to(getattr(torch, self.config.state))) for kind in ("mean", "square"))
                self._means[name] = _Means(mean, square, int(held["steps"]))


def matrix_rows(name: str, shape: tuple[int, ...], head_size: int) -> int:
    """Rows of one matrix inside a fused parameter [.., O, I]: a head of qkv, gate or up, or all rows."""
    if name.endswith("attn.qkv.weight"):
        return head_size
    if name.endswith(("gate_up.weight", "experts.gate_up")):
        return shape[-2] // 2
    return shape[-2]


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix to each [.., O, I], roughly: singular values end between about 0.7 and 1.2.

    Newton-Schulz iteration `X <- a X + (b A + c A A) X`, `A = X X^T`, as Muon has it; in float32, since a CPU gains nothing from less.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MovingAverage:
    """Weights averaged over a window of tokens: stands in for a run whose learning rate was decayed over that window.

    An update that is n tokens old weighs `1 - residual ** (n / window)`: the newest are damped, those older than the window are whole but
    for `residual`. Source: ERNIE 4.5 technical report. Held in float32 on the CPU.
    """

    def __init__(self, optimiser: Optimiser, window: int, residual: float = 0.05) -> None:
        if window < 1:
            raise ConfigError(f"the window of the moving average must be at least one token, not {window}")
        self.window, self.residual = window, residual
        self.weights = {name: optimiser.master(name).clone() for name in optimiser.parameters}

    @torch.no_grad()
    def update(self, optimiser: Optimiser, tokens: int) -> None:
        """Take in the weights after a step that learned from `tokens` tokens."""
        share = 1 - self.residual ** (tokens / self.window)
        for name, average in self.weights.items():
            average.lerp_(optimiser.master(name), share)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Put back averaged weights. Raises CheckpointError when they are of another model."""
        if set(weights) != set(self.weights) or any(weights[name].shape != held.shape for name, held in self.weights.items()):
            raise CheckpointError(f"{where}: the averaged weights are of another model")
        for name, held in self.weights.items():
            held.copy_(weights[name])

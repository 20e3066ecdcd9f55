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

from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.vision import TowerAttention
from ernie45.parallel.shard import clip, of_matrices, total_norm
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


class Optimiser:
    """One step at a time over the parameters of `model` that want a gradient.

    Parameters that are not float32 have float32 masters here: the step is taken in float32 and rounded back.
    `head_size` is the rows of one attention head, for Muon's split of fused qkv matrices. `folder` is where masters and state are kept, as
    files that nobody sees; None keeps them in memory.
    """

    def __init__(self, model: nn.Module, config: OptimiserConfig, head_size: int, folder: Path | None = None) -> None:
        self.config, self.head_size = config, head_size
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError("nothing is to be trained: every parameter is frozen")
        self._kept: Callable[[Tensor], Tensor] = partial(filed, folder=folder) if folder is not None else torch.clone
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(self._kept(p.detach().float()), requires_grad=False)
            for name, p in self.parameters.items()
        }
        muon = {name for name, p in self.parameters.items() if config.kind == "muon" and is_hidden_matrix(name, p)}
        towers = {name: part for name, part in model.named_modules() if isinstance(part, TowerAttention)}
        self._tower_heads = {f"{name}.qkv.weight": part.head_size for name, part in towers.items()}
        self._muon = {name: self._zeros(name) for name in self.parameters if name in muon}
        groups = [
            {"params": [self.masters[name]], "lr": 0.0, "weight_decay": self._decay(name), "name": name}
            for name in self.parameters
            if name not in muon
        ]
        # the fused form reads each tensor once instead of ten times
        self._adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True) if groups else None
        if self._adamw is not None and folder is not None:  # in memory torch makes its state itself, for those that learn
            for group in groups:
                held = {"step": torch.zeros(()), "exp_avg": self._zeros(group["name"]), "exp_avg_sq": self._zeros(group["name"])}
                self._adamw.state[group["params"][0]] = held

    def _zeros(self, name: str) -> Tensor:
        return self._kept(torch.zeros_like(self.masters[name], requires_grad=False))

    def _decay(self, name: str) -> float:
        return self.config.weight_decay if decays(name, self.parameters[name]) else 0.0

    def _rate(self, name: str, rate: float) -> float:
        if name.endswith("router.weight"):
            return rate * self.config.router_rate
        if "sight.tower." in name:
            rate *= self.config.tower_rate
        return rate * self.config.b_rate if name.endswith(".adapter_b") else rate

    def gradient_norm(self) -> float:
        """Norm of all gradients together; not a number or infinite when any of them is."""
        return total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def step(self, rate: float, norm: float) -> None:
        """Clip by the known `norm`, step at learning rate `rate`, and drop the gradients."""
        assert math.isfinite(norm), "a step with a gradient that is not finite is refused before it comes here"
        if self.config.clip:
            clip(list(self.parameters.values()), self.config.clip, norm)
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None  # it goes as its wide copy comes
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = self._rate(group["name"], rate)
            self._adamw.step()
        for name, momentum in self._muon.items():
            self._step_muon(name, momentum, rate)
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)
                    master.grad = None
        self.drop_gradients()

    @torch.no_grad()
    def _step_muon(self, name: str, momentum: Tensor, rate: float) -> None:
        master = self.masters[name]
        if master.grad is None:
            return
        momentum.lerp_(master.grad, 1 - self.config.momentum)
        ahead = master.grad.lerp(momentum, self.config.momentum)
        rows = matrix_rows(name, tuple(ahead.shape), self._tower_heads.get(name, self.head_size))
        update = of_matrices(lambda whole: orthogonalised(whole.unflatten(-2, (-1, rows))).flatten(-3, -2), ahead)
        # 0.2 sqrt(max side) gives the update the root mean square that AdamW's has, so one learning rate serves both
        master.mul_(1 - rate * self._decay(name)).add_(update, alpha=-rate * 0.2 * math.sqrt(max(rows, ahead.shape[-1])))

    def drop_gradients(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything beside the parameters that the next step depends on: `mean/NAME`, `square/NAME`, `steps/NAME`, ..."""
        state: dict[str, Tensor] = {f"momentum/{name}": momentum for name, momentum in self._muon.items()}
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                state[f"master/{name}"] = master.detach()
            held = self._adamw.state.get(master) if self._adamw is not None else None
            if held:
                state |= {f"mean/{name}": held["exp_avg"], f"square/{name}": held["exp_avg_sq"], f"steps/{name}": held["step"]}
        return state

    def blank_state(self, keys: Iterable[str], where: str) -> dict[str, Tensor]:
        """Empty tensors, cut as this rank's are, for the `keys` of another `state`, to be filled and loaded.

        Raises CheckpointError when they are of another model or optimiser.
        """
        blank: dict[str, Tensor] = {}
        for key in keys:
            kind, _, name = key.partition("/")
            if name not in self.masters:
                raise CheckpointError(f"{where}: holds the optimiser state of another model or method: {key}")
            blank[key] = torch.zeros(()) if kind == "steps" else torch.zeros_like(self.masters[name], requires_grad=False)
        return blank

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], where: str) -> None:
        """Put back what `state` gave, bit for bit. Raises CheckpointError when it is the state of another model or optimiser."""
        names = {key.partition("/")[2] for key in state}
        kinds = {key.partition("/")[0] for key in state}
        if not names <= set(self.parameters) or not kinds <= {"momentum", "master", "mean", "square", "steps"}:
            strange = sorted(names - set(self.parameters))[:3] or sorted(kinds)
            raise CheckpointError(f"{where}: holds the optimiser state of another model or method: {', '.join(strange)}")
        for name, master in self.masters.items():
            shaped = [state[key] for kind in ("momentum", "master", "mean", "square") if (key := f"{kind}/{name}") in state]
            if any(tensor.shape != master.shape for tensor in shaped) or (f"momentum/{name}" in state) != (name in self._muon):
                raise CheckpointError(f"{where}: the optimiser state of {name} does not fit this run's model and optimiser")
            if f"master/{name}" in state and master is not self.parameters[name]:
                master.copy_(state[f"master/{name}"])
            if name in self._muon:
                self._muon[name].copy_(state[f"momentum/{name}"])
            elif f"mean/{name}" in state and self._adamw is not None:
                self._adamw.state[master] = {
                    "step": state[f"steps/{name}"].clone(),
                    "exp_avg": self._kept(state[f"mean/{name}"]),
                    "exp_avg_sq": self._kept(state[f"square/{name}"]),
                }


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
        self.weights = {name: master.detach().clone() for name, master in optimiser.masters.items()}

    @torch.no_grad()
    def update(self, optimiser: Optimiser, tokens: int) -> None:
        """Take in the weights after a step that learned from `tokens` tokens."""
        share = 1 - self.residual ** (tokens / self.window)
        for name, average in self.weights.items():
            average.lerp_(optimiser.masters[name], share)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Put back averaged weights. Raises CheckpointError when they are of another model."""
        if set(weights) != set(self.weights) or any(weights[name].shape != held.shape for name, held in self.weights.items()):
            raise CheckpointError(f"{where}: the averaged weights are of another model")
        for name, held in self.weights.items():
            held.copy_(weights[name])

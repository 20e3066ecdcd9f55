"""What trains the routers beside the language loss, and the measurement that moves their selection bias.

Formulas: ERNIE 4.5 technical report and the published training code. Letters: T tokens, D width, E experts, L expert layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie45.nn.moe import Bank, Router
from ernie45.ops import Routing

EPS = 1e-12


def orthogonal_loss(weight_ED: Tensor) -> Tensor:
    """`||W W^T - I||_F^2 / E^2` over the experts' unit vectors, float32: 0 when no two experts ask for the same direction."""
    unit_ED = F.normalize(weight_ED.float(), dim=-1, eps=EPS)
    return (unit_ED @ unit_ED.t() - torch.eye(weight_ED.shape[0], device=weight_ED.device)).square().mean()


def load_balance_loss(logits_TE: Tensor, top_k: int) -> Tensor:
    """`E * sum_e mean_t(p_te) * c_e`, c_e = choices of expert e per token, without gradient. Perfect balance gives `top_k`.

    Choices are counted without the selection bias: the loss speaks to the router's own scores, the bias corrects what remains.
    """
    scores_TE = logits_TE.float().softmax(-1)
    chosen_TC = scores_TE.topk(top_k, dim=-1).indices
    counts_E = torch.bincount(chosen_TC.flatten(), minlength=logits_TE.shape[1]) / logits_TE.shape[0]
    return logits_TE.shape[1] * (scores_TE.mean(0) * counts_E).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of `logsumexp(logits)^2`: keeps the router's logits from drifting."""
    return logits_TE.float().logsumexp(-1).square().mean()


def moved_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The selection bias after one step: up by `rate` for experts below the mean load, down above it, unmoved at it."""
    load = load_E.to(torch.float64)
    return bias_E + rate * (load.mean() - load).sign().to(bias_E.dtype)


class RouterPass(NamedTuple):
    """One router in one forward pass: its logits [T, E] with gradient, experts a token takes, whether it is for seen tokens."""

    logits_TE: Tensor
    top_k: int
    sees: bool = False


class RouterWatch:
    """Looks at every router of a module from outside, by forward hooks: the model's own code has no training in it.

    Only what happens inside `recording()` is counted, so a layer that is computed again in backward is counted once. `load_LE` adds up over
    the passes of an optimiser step until `take_load`. A router of a second bank hears seen tokens alone, so its load, losses and bias are
    those of its modality; `sees` says which routers these are.
    """

    def __init__(self, module: nn.Module, *, want_logits: bool) -> None:
        self.routers = [part for part in module.modules() if isinstance(part, Router)]
        banks = {id(part.router) for part in module.modules() if isinstance(part, Bank)}
        self.sees = [id(router) in banks for router in self.routers]
        self.want_logits = want_logits
        self._recording = False
        self._passes: list[RouterPass] = []
        self._loads = [torch.zeros(router.weight.shape[0], dtype=torch.int64) for router in self.routers]
        self._hooks = [router.register_forward_hook(self._hook(index)) for index, router in enumerate(self.routers)]

    def _hook(self, index: int) -> Any:
        def seen(router: Router, inputs: tuple[Tensor, ...], output: Routing) -> None:
            # a second computation of a layer must do the same operations as the first, so logits are made then too
            logits_TE = F.linear(inputs[0].float(), router.weight) if self.want_logits and torch.is_grad_enabled() else None
            if self._recording:
                self._loads[index] += torch.bincount(output.experts.flatten(), minlength=router.weight.shape[0]).cpu()
                if logits_TE is not None:
                    self._passes.append(RouterPass(logits_TE, router.top_k, self.sees[index]))

        return seen

    @contextmanager
    def recording(self) -> Iterator[list[RouterPass]]:
        """Around one forward pass; gives the list that its routers fill."""
        assert not self._recording, "one forward pass at a time"
        self._recording, self._passes = True, []
        try:
            yield self._passes
        finally:
            self._recording = False

    def take_load(self) -> list[Tensor]:
        """Choices of each expert since the last call, int64 [E] a layer; counting begins again."""
        taken = self._loads
        self._loads = [torch.zeros_like(load) for load in taken]
        return taken

    def close(self) -> None:
        """Stop looking."""
        for hook in self._hooks:
            hook.remove()

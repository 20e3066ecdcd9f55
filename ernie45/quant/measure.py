"""What quantising cost, measured on text that took no part in it: perplexity, divergence from the original, agreement of the first choice.

Letters: R rows (tokens that have a successor), V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernie45.errors import ConfigError
from ernie45.quant.methods import MatrixReport


@dataclass(frozen=True)
class Quality:
    """Two models on the same held-out tokens.

    `divergence` is the mean KL(original || quantised) in nats per token, `agreement` the share of tokens where both hold the same next
    token likeliest, `nll_spread` the standard error of the mean difference of the two losses: a ratio whose logarithm is within twice that
    of zero is no measured loss.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    divergence: float
    agreement: float
    nll_spread: float

    @property
    def ratio(self) -> float:
        """Perplexity after over perplexity before; 1 is no loss."""
        return self.perplexity_after / self.perplexity_before


@dataclass
class QualityCounter:
    """Adds up `Quality` from pieces of text."""

    tokens: int = 0
    _before: float = 0.0
    _after: float = 0.0
    _divergence: float = 0.0
    _agreed: int = 0
    _differences: list[Tensor] = field(default_factory=list)

    def add(self, before_RV: Tensor, after_RV: Tensor, next_R: Tensor) -> None:
        """Logits of the original and the quantised model for R tokens, and the tokens that really follow."""
        before, after = before_RV.float().log_softmax(-1), after_RV.float().log_softmax(-1)
        losses = [-scores.gather(1, next_R[:, None])[:, 0].double() for scores in (before, after)]
        self.tokens += len(next_R)
        self._before += float(losses[0].sum())
        self._after += float(losses[1].sum())
        self._divergence += float((before.exp() * (before - after)).sum(dtype=torch.float64))
        self._agreed += int((before.argmax(-1) == after.argmax(-1)).sum())
        self._differences.append(losses[1] - losses[0])

    @property
    def total_difference(self) -> float:
        """What the quantised model lost on all tokens so far, in nats."""
        return self._after - self._before

    def quality(self) -> Quality:
        """The means. A model whose logits are not numbers has an infinite perplexity."""
        assert self.tokens, "nothing was measured"
        n = self.tokens
        spread = float(torch.cat(self._differences).std()) / math.sqrt(n) if n > 1 else 0.0
        return Quality(n, _exp(self._before / n), _exp(self._after / n), self._divergence / n, self._agreed / n, spread)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # also for NaN


def windows(ids: Sequence[int], count: int, length: int, what: str) -> Tensor:
    """The first `count` windows of `length` tokens, int64 [count, length].

    Raises `ConfigError`, with both numbers, when the text has too few tokens for a single window: a measurement of nothing is none.
    """
    whole = min(count, len(ids) // length)
    if whole < 1:
        raise ConfigError(f"the {what} text has {len(ids):,} tokens, one window needs {length:,}; give a longer text or shorter windows")
    return torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)


@dataclass(frozen=True)
class LayerReport:
    """One layer: its matrices, and how far the held-out hidden states of the quantised model have drifted by its end (energy ratio)."""

    layer: int
    drift: float
    matrices: tuple[MatrixReport, ...]


def worst(layers: Sequence[LayerReport], count: int = 5) -> list[MatrixReport]:
    """The matrices whose outputs lost most."""
    return sorted((matrix for layer in layers for matrix in layer.matrices), key=lambda matrix: -matrix.error)[:count]


def picture(layers: Sequence[LayerReport], title: str) -> str:
    """Output error of every matrix and the drift by layer, as an SVG on a logarithmic scale."""
    series: dict[str, list[tuple[int, float]]] = {}
    for layer in layers:
        for matrix in layer.matrices:
            series.setdefault(matrix.name.split(".", 2)[2], []).append((layer.layer, matrix.error))
        series.setdefault("drift of hidden state", []).append((layer.layer, layer.drift))
    values = [value for points in series.values() for _, value in points if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    last = max(1, max((layer.layer for layer in layers), default=1))
    colours = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#111111")

    def place(layer: int, value: float) -> str:
        return f"{70 + 520 * layer / last:.1f},{350 - 300 * (math.log10(max(value, 10**low)) - low) / (high - low):.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 400" font-family="sans-serif" font-size="12">',
        '<rect width="800" height="400" fill="white"/>',
        f'<text x="70" y="25" font-size="15">{_escaped(title)}</text>',
        '<text x="330" y="390" text-anchor="middle">layer</text>',
    ]
    for power in range(low, high + 1):
        y = 350 - 300 * (power - low) / (high - low)
        parts.append(f'<path d="M70,{y:.1f}H590" stroke="#ddd"/><text x="62" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    parts += [f'<text x="{70 + 520 * n / last:.1f}" y="368" text-anchor="middle">{n}</text>' for n in range(0, last + 1, max(1, last // 6))]
    for row, (name, points) in enumerate(sorted(series.items())):
        colour = "#111111" if name.startswith("drift") else colours[row % 6]
        line = " ".join(place(*point) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = 60 + 20 * row
        parts.append(f'<path d="M600,{y - 4}h20" stroke="{colour}" stroke-width="2"/><text x="626" y="{y}">{_escaped(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

"""What a model will take of memory, reckoned before a byte of its weights is read. No tensors here.

Letters in the formulas: T tokens of a step, D width, N query heads, K key heads, H head size, F feed-forward width, V vocabulary, S longest
sequence.
"""

from dataclasses import dataclass

from ernie45.errors import ConfigError
from ernie45.models.config import TextConfig
from ernie45.models.counts import count_parameters, weight_bytes

CACHE_SHARE = 0.5  # of what weights and work leave, at most, for an automatic cache: the system and other processes need some too
_PACKED_BITS = 4.5  # of a weight packed by w4a8 with groups of 32, scales included


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """Bytes of a model at work, by part.

    weights    exact, from the files' headers and the compute type
    work       the largest step: activations, attention's masks and copies, logits and their sampling
    adapters   what adapters may take, 0 when none are served
    sequence   cache of one sequence of `length` tokens, the least that is any use
    cache      cache that all sequences could use, or the one that was asked for
    """

    weights: int
    work: int
    adapters: int
    sequence: int
    length: int
    cache: int

    @property
    def fixed(self) -> int:
        """Everything but the cache."""
        return self.weights + self.work + self.adapters

    @property
    def least(self) -> int:
        """Below this it is not loaded."""
        return self.fixed + self.sequence

    def grant(self, left: int) -> int:
        """Bytes it gets where `left` are left: itself and, for the cache, what it can use within half of the rest."""
        return self.fixed + min(self.cache, max(self.sequence, int((left - self.fixed) * CACHE_SHARE)))

    def text(self) -> str:
        """The parts, for people."""
        parts = [("weights", self.weights), ("work", self.work), ("adapters", self.adapters), ("cache for one sequence", self.sequence)]
        return " + ".join(f"{name} {gib(size)}" for name, size in parts if size)


def plan_memory(
    config: TextConfig,
    *,
    weights: int,
    value_bytes: int,
    token_bytes: int,
    page_size: int,
    num_pages: int | None,
    max_length: int | None,
    token_budget: int,
    max_running: int,
    adapter_bytes: int = 0,
) -> EnginePlan:
    """The plan of a model whose weights take `weights` bytes and whose values `value_bytes` each, and its cache `token_bytes` a
    token; the rest are an engine's settings."""
    wanted = min(max_length or config.max_positions, config.max_positions)
    page = page_size * token_bytes
    per_sequence = -(-wanted // page_size)
    asked = max_length is not None or num_pages is not None
    # a model that knows 131,072 positions is of use with fewer, unless somebody asked for all
    least = (num_pages or per_sequence) if asked else min(per_sequence, -(-2048 // page_size))
    pages = num_pages if num_pages is not None else per_sequence * max_running
    return EnginePlan(
        weights=weights,
        work=_work(config, value_bytes, token_budget, max_running, wanted),
        adapters=adapter_bytes,
        sequence=least * page,
        length=least * page_size,
        cache=pages * page,
    )


def _work(c: TextConfig, value_bytes: int, tokens: int, running: int, longest: int) -> int:
    """The largest step: T (4 D + 2 (N + 2 K) H + 3 F) values (an expert layer: top_k experts' widths), a mask T S and copies of one
    sequence's keys and values 2 S K H, and float32 logits V of each running sequence, three times (raw, changed, sorted)."""
    e = c.experts
    inner = 3 * c.ffn_size if e is None else max(3 * c.ffn_size, e.top_k * (3 * e.expert_size + 2 * c.hidden_size) + 3 * e.shared_size)
    values = tokens * (4 * c.hidden_size + 2 * (c.query_size + 2 * c.kv_size) + inner)
    values += tokens * min(longest, 8192) + 2 * longest * c.kv_size  # a chunk far into a long text is the rare case: its mask is not kept
    return values * value_bytes + 3 * running * c.vocab_size * 4


def check_fits(plan: EnginePlan, available: int, name: str, config: TextConfig, *, packed: bool) -> None:
    """Raises `ConfigError`, with the numbers and what would help, when a model cannot be loaded into `available` bytes."""
    if plan.least <= available:
        return
    raise ConfigError(
        f"{name} does not fit: {plan.text()} ({plan.length:,} tokens) make {gib(plan.least)}, and {gib(available)} are available. "
        + _advice(plan, available, config, packed=packed)
    )


def _advice(plan: EnginePlan, available: int, config: TextConfig, *, packed: bool) -> str:
    if plan.fixed <= available:
        fewer = max(0, int((available - plan.fixed) / max(1, plan.sequence) * plan.length))
        return f"Weights and work do fit: set max_length to at most {fewer:,} tokens, or num_pages smaller"
    small = weight_bytes(count_parameters(config), _PACKED_BITS)
    if not packed and small + plan.work + plan.adapters + plan.sequence <= available:
        return f"What helps: `ernie quantize` packs its weights to about {gib(small)} (w4a8-g32)"
    return "What helps: a smaller model, or more memory" + ("" if packed else f"; packed to 4 bits its weights would take {gib(small)}")


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"

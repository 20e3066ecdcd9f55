"""What a model takes of memory when it works, reckoned before a byte of its weights is read: one plan for `ernie inspect` and engines.

No tensors here. Weights and cache are exact; work is an estimate, and docs/design/memory.md shows what it was against measured figures.
Letters in the formulas: T tokens of a step, D width, Q all query heads together, K all key heads, F feed-forward width, V vocabulary,
I the widest input of a matrix, P pairs of token and expert, S patches of a picture.
"""

from dataclasses import dataclass, replace

from ernie45.errors import ConfigError
from ernie45.models.config import TextConfig
from ernie45.models.counts import kv_bytes_per_token
from ernie45.models.sizes import usual_spec, weight_bytes
from ernie45.models.vision_config import ModelConfig, VisionConfig

CACHE_SHARE = 0.5  # of what weights and work leave, at most, for an automatic cache: the system and other processes need some too
PICTURE_BYTES = 1 << 29
"""Of encoded pictures that an engine keeps, unless it is told otherwise."""
_FIRST_CALLS = 16 << 20  # what libraries take for themselves when they are first used, measured 6 to 10 MiB
_WORD_BYTES = 1 << 10  # of a tokenizer, for each word: measured 0.8 to 1.2 KiB
_KEPT = 3  # times the values of a step made layer by layer: the allocator keeps pieces that no later tensor fits into (measured 2 to 4)
_SHORT = 2048  # tokens that a model has to hold at least, when nobody says how many
_LARGEST_PICTURE = 6177  # tokens of the largest picture that the published processor makes
_PIECE = 1024  # patches that the tower computes at a time


@dataclass(frozen=True)
class Held:
    """Bytes of weights, and how many of them stay in the mapped file, where the system can drop and read them again."""

    total: int
    mapped: int = 0


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a model is to do, as far as it costs memory.

    value_bytes    of a number in activations and, unless `token_bytes` says otherwise, in the cache
    step_tokens    tokens computed at once, at most
    max_length     of a sequence; None = what the model knows, or what fits
    num_pages      of the cache; None = `max_running` sequences, or what fits
    native         whether steps run as one native call (matrices packed or in bfloat16, kernels installed)
    input_bytes    of a number that meets a matrix there: one where activations are rounded for packed matrices
    sketched       whether the native step keeps a sketch of the head, as it does of one of 8 bits
    adapter_bytes  of adapters, 0 when none are served
    tokenizer      whether the same process holds one
    """

    value_bytes: int
    token_bytes: int | None = None
    page_size: int = 32
    num_pages: int | None = None
    max_length: int | None = None
    step_tokens: int = 2048
    max_running: int = 1
    native: bool = False
    input_bytes: int = 1
    sketched: bool = True
    adapter_bytes: int = 0
    picture_bytes: int = PICTURE_BYTES
    tokenizer: bool = True


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of a model at work, by part.

    weights    exact; `mapped` of them stay in the mapped file
    work       the largest step, and for a model that sees the largest picture under way
    tokenizer  where the process holds one
    pictures   encoded pictures that are kept, 0 for a model that sees none
    adapters   what adapters may take, 0 when none are served
    sequence   cache of one sequence of `length` tokens, the least that is any use
    cache      cache that all sequences could use, or the one that was asked for; `token_bytes` for each token
    """

    weights: int
    work: int
    sequence: int
    length: int
    cache: int
    token_bytes: int = 1
    mapped: int = 0
    tokenizer: int = 0
    pictures: int = 0
    adapters: int = 0

    @property
    def fixed(self) -> int:
        """Everything but the cache."""
        return self.weights + self.work + self.tokenizer + self.pictures + self.adapters

    @property
    def least(self) -> int:
        """Below this it is not loaded."""
        return self.fixed + self.sequence

    @property
    def total(self) -> int:
        """With the whole cache."""
        return self.fixed + self.cache

    def grant(self, left: int) -> int:
        """Bytes it gets where `left` are left: itself and, for the cache, what it can use within half of the rest."""
        return self.fixed + min(self.cache, max(self.sequence, int((left - self.fixed) * CACHE_SHARE)))

    def parts(self) -> dict[str, int]:
        """Name and bytes of what it takes beside the cache, in order; parts of nothing are left out."""
        named = {"mapped weights": self.mapped, "weights": self.weights - self.mapped, "work": self.work}
        named |= {"tokenizer": self.tokenizer, "pictures": self.pictures, "adapters": self.adapters}
        return {name: size for name, size in named.items() if size}

    def text(self, cache: int | None = None) -> str:
        """The parts, for people: with so many bytes of cache, or with what one sequence needs."""
        size = self.sequence if cache is None else cache
        last = f"cache {gib(size)} ({size // self.token_bytes:,} tokens)"
        return " + ".join([*(f"{name} {gib(part)}" for name, part in self.parts().items()), last])


def plan_memory(config: ModelConfig, held: Held, use: Use) -> MemoryPlan:
    """The plan of a model whose weights are `held`, for `use`."""
    text = config.text
    wanted = min(use.max_length or text.max_positions, text.max_positions)
    token_bytes = use.token_bytes or kv_bytes_per_token(text, use.value_bytes)
    page = use.page_size * token_bytes
    per_sequence = -(-wanted // use.page_size)
    asked = use.max_length is not None or use.num_pages is not None
    # a model that knows 131,072 positions is of use with fewer, unless somebody asked for all
    least = (use.num_pages or per_sequence) if asked else min(per_sequence, -(-_SHORT // use.page_size))
    pages = use.num_pages if use.num_pages is not None else per_sequence * use.max_running
    work = _FIRST_CALLS + _logits(text, use.max_running)
    work += _native_step(text, use) if use.native else _step(text, use, wanted)
    return MemoryPlan(
        weights=held.total,
        mapped=held.mapped,
        work=work + (_picture_work(config.vision, use.value_bytes) if config.vision else 0),
        tokenizer=text.vocab_size * _WORD_BYTES if use.tokenizer else 0,
        pictures=use.picture_bytes if config.vision else 0,
        adapters=use.adapter_bytes,
        sequence=least * page,
        length=least * use.page_size,
        cache=pages * page,
        token_bytes=token_bytes,
    )


def _logits(c: TextConfig, running: int) -> int:
    """In float32, of each running sequence, three times: raw, changed, sorted."""
    return 3 * running * c.vocab_size * 4


def _step(c: TextConfig, use: Use, longest: int) -> int:
    """A step made layer by layer: T (3 D + 3 F) values, for experts P (2 D + 3 F) more, or T (3 D + 3 Q + 4 K) in attention, where
    a chunk that continues a sequence has a mask and copies of its keys and values."""
    e, tokens = c.experts, use.step_tokens
    inner = 3 * c.ffn_size if e is None else max(3 * c.ffn_size, e.top_k * (3 * e.expert_size + 2 * c.hidden_size) + 3 * e.shared_size)
    attention = 3 * c.query_size + 4 * c.kv_size
    # a chunk far into a long text is the rare case: its mask is not kept
    continuing = tokens * min(longest, 8192) + 2 * longest * c.kv_size if longest > tokens else 0
    return (_KEPT * tokens * (3 * c.hidden_size + max(inner, attention)) + continuing) * use.value_bytes


def _native_step(c: TextConfig, use: Use) -> int:
    """A step in one native call, whose memory is asked for once: T (D + 2 Q + F) values, inputs twice, those of 8 bits T I (1 + 1/4)
    with scales and sums for groups of 32; for experts T 2 D + P (D + F) values and the inputs of pairs. Kept beside it: the sketch of a
    head of 8 bits, V D (1/2 + 1/16) with scales for groups of 32 at most."""
    e, tokens = c.experts, use.step_tokens
    values = tokens * (c.hidden_size + 2 * c.query_size + c.ffn_size)
    inputs = tokens * max(c.hidden_size, c.query_size, c.ffn_size)
    if e is not None:
        pairs = tokens * e.top_k
        values += 2 * tokens * c.hidden_size + pairs * (c.hidden_size + e.expert_size)
        inputs += pairs * max(c.hidden_size, e.expert_size)
    sketch = c.vocab_size * c.hidden_size * 9 // 16 if use.sketched and use.input_bytes == 1 else 0
    return values * use.value_bytes + 2 * inputs * use.input_bytes * 5 // 4 + sketch


def _picture_work(v: VisionConfig, value_bytes: int) -> int:
    """The largest picture while it is encoded: S patches in float32, S (D + 3 D + 2 D) values, and a piece's own beside them."""
    patches = _LARGEST_PICTURE * v.merge**2
    piece = _KEPT * _PIECE * (2 * v.ffn_size + 4 * v.size)
    return patches * v.patch_values * 4 + (patches * 6 * v.size + piece) * value_bytes


# ---- what fits


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run a model: how it is stored, with or without what it needs to see, and what that takes."""

    name: str
    scheme: str | None
    text_only: bool
    plan: MemoryPlan


def usual_use(config: ModelConfig, *, value_bytes: int = 2, packed: bool = False) -> Use:
    """One conversation of up to 8,192 tokens: what is told to those who have not said more."""
    native = packed or (value_bytes == 2 and not (config.text.use_bias or config.text.head_bias))
    return Use(
        value_bytes=value_bytes,
        max_length=min(8192, config.text.max_positions),
        native=native,
        input_bytes=1 if packed else value_bytes,
    )


def choices(config: ModelConfig, *, float_bytes: int = 2, use: Use | None = None) -> list[Choice]:
    """Ways to run a model, the most exact first: as floats, in 8 and in 4 bits, and each without what it needs to see."""
    found = []
    for name, scheme in ((f"{8 * float_bytes}-bit floats", None), ("8 bits", "w8a8-g64"), ("4 bits", "w4a8-g64")):
        for text_only in (False, True) if config.vision else (False,):
            asked = replace(config, vision=None) if text_only else config
            held = Held(weight_bytes(asked, usual_spec(asked, scheme) if scheme else None, float_bytes=float_bytes))
            plan = plan_memory(asked, held, use or usual_use(asked, value_bytes=float_bytes, packed=scheme is not None))
            found.append(Choice(name=name + (", text only" if text_only else ""), scheme=scheme, text_only=text_only, plan=plan))
    return found


def advice(config: ModelConfig, available: int, *, float_bytes: int = 2, use: Use | None = None) -> list[str]:
    """What fits into `available` bytes, in sentences with numbers: the most exact choice, or by how much the smallest one does not."""
    every = choices(config, float_bytes=float_bytes, use=use)
    fitting = [choice for choice in every if choice.plan.least <= available]
    seeing = next((choice for choice in fitting if not choice.text_only), None)
    if not fitting:
        least = min(every, key=lambda choice: choice.plan.least)
        return [f"nothing fits into {gib(available)}: even {least.name} takes {_taken(least)}"]
    lines = []
    if seeing:
        lines.append(f"{seeing.name} fit into {gib(available)}: {_taken(seeing)}" + _how(seeing))
    elif config.vision:
        lines.append(f"with its eyes it does not fit into {gib(available)}")
    if config.vision:
        text = next(choice for choice in fitting if choice.text_only)
        if seeing is None or every.index(text) < every.index(seeing):
            lines.append(f"{text.name} fit: {_taken(text)}{_how(text)}")
    return lines


def check_fits(plan: MemoryPlan, available: int, name: str, config: ModelConfig, use: Use, *, packed: bool) -> None:
    """Raises `ConfigError`, with the numbers and what would help, when a model cannot be loaded into `available` bytes."""
    if plan.least <= available:
        return
    if plan.fixed <= available:
        fewer = max(0, int((available - plan.fixed) / max(1, plan.sequence) * plan.length))
        help = f"Weights and work do fit: set max_length to at most {fewer:,} tokens, or num_pages smaller"
    elif packed:
        help = "What helps: a smaller model, or more memory"
    else:
        help = "What helps: " + "; ".join([*advice(config, available, use=use), "a smaller model", "more memory"])
    raise ConfigError(f"{name} does not fit: {plan.text()} make {gib(plan.least)}, and {gib(available)} are available. {help}")


def _taken(choice: Choice) -> str:
    return f"{gib(choice.plan.least)}: {choice.plan.text()}"


def _how(choice: Choice) -> str:
    steps = ([f"ernie quantize --scheme {choice.scheme.partition('-')[0]}"] if choice.scheme else []) + (
        ["load with text_only"] if choice.text_only else []
    )
    return f" ({', '.join(steps)})" if steps else ""


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"

"""What is quantised, and how: a table from module names to schemes, without torch.

A scheme is a word: `w4a8` (weights of 4 bits, activations of 8) or `w4a16` (activations stay as they are), with a group such as
`w4a8-g64`, or without, a scale per channel; `-h` at its end turns the inputs by a Hadamard matrix first (`ops/quantised.py`).
`fp8-block`, `fp8-channel` and `fp8-tensor` are E4M3 numbers (`ops/fp8.py`), with `-static` and `-h` or without; `ccq2.06`, `ccq2.5` and
`tcq2.06` are codes of about two bits (`ops/codes.py`), with `-h` or without. Rules are tried in order, the first whose pattern fits a
module's name decides, and every matrix that can be quantised must be decided by one.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ernie45.config import from_mapping
from ernie45.errors import ConfigError

GROUPS = (0, 32, 64, 128)  # 0: one scale per output channel
_WORD = re.compile(r"w(\d+)a(\d+)(?:-g(\d+))?(-h)?")
_CODE_WORD = re.compile(r"(ccq2\.06|ccq2\.5|tcq2\.06)(-h)?")
CODE_BITS = {"ccq2.06": (2 + 4 / 64, 48), "ccq2.5": (2.5, 16), "tcq2.06": (2 + 4 / 64, 16)}
"""Bits a weight of the codes, local scales included, and of the constants of a row."""


@dataclass(frozen=True)
class Scheme:
    """`weight_bits` 4 or 8, `group` inputs per scale (0: all of a row); activations are quantised to `act_bits` 8 as they come, or with
    16 stay in the type they have.

    `hadamard`: weights and activations are turned by a Hadamard matrix before they are rounded, which spreads single large inputs. `code`:
    which code of about two bits the weights are stored in, with `weight_bits` 2 and `group` 64; "" for none.
    """

    weight_bits: int
    group: int
    hadamard: bool = False
    act_bits: int = 8
    code: str = ""

    @classmethod
    def parse(cls, word: str) -> "Scheme":
        """Read `w4a8-g64` and its like. Raises `ConfigError` for anything else."""
        coded = _CODE_WORD.fullmatch(word)
        if coded:
            return cls(2, 64, bool(coded[2]), code=coded[1])
        found = _WORD.fullmatch(word)
        if not found or found[1] not in ("4", "8") or found[2] not in ("8", "16") or int(found[3] or 0) not in GROUPS or found[3] == "0":
            raise ConfigError(
                f"'{word}' is not a quantisation scheme; write w4a8, w8a8, w4a16 or w8a16, with -g32, -g64 or -g128 "
                "for groups, or ccq2.06, ccq2.5 or tcq2.06; and -h to turn inputs"
            )
        return cls(int(found[1]), int(found[3] or 0), bool(found[4]), int(found[2]))

    def __str__(self) -> str:
        if self.code:
            return self.code + ("-h" if self.hadamard else "")
        return f"w{self.weight_bits}a{self.act_bits}" + (f"-g{self.group}" if self.group else "") + ("-h" if self.hadamard else "")

    @property
    def float_inputs(self) -> bool:
        """Whether activations stay as they are."""
        return self.act_bits == 16

    def bits_per_weight(self, in_size: int) -> float:
        """Bits of one weight, its share of the float16 scale included."""
        if self.code:
            each, row = CODE_BITS[self.code]
            return each + row / in_size
        return self.weight_bits + 16 / (self.group or in_size)


@dataclass(frozen=True)
class Fp8Scheme:
    """Weights and activations of E4M3 numbers. `weights` says what shares a scale: a "block" of 128 x 128, a "channel" or the "tensor".

    Activations get a scale per 128 inputs of a token where weights have blocks, else per token; with `static` one scale for all that a
    matrix reads, measured on the calibration text. `hadamard`: weights and activations are turned by Hadamard matrices of `group` inputs
    before they are rounded.
    """

    weights: str
    static: bool = False
    hadamard: bool = False
    group: ClassVar[int] = 32

    @classmethod
    def parse(cls, word: str) -> "Fp8Scheme":
        """Read `fp8-block`, `fp8-tensor-static` and their like. Raises `ConfigError` for anything else."""
        found = re.fullmatch(r"fp8-(block|channel|tensor)(-static)?(-h)?", word)
        if not found:
            raise ConfigError(
                f"'{word}' is not a quantisation scheme; write fp8-block, fp8-channel or fp8-tensor, or with -static, and -h to turn inputs"
            )
        return cls(found[1], bool(found[2]), bool(found[3]))

    def scales(self, out_size: int, in_size: int) -> tuple[int, int]:
        """How many scales a matrix [O, I] has, down and across."""
        return {"block": (-(-out_size // 128), -(-in_size // 128)), "channel": (out_size, 1), "tensor": (1, 1)}[self.weights]

    def __str__(self) -> str:
        return f"fp8-{self.weights}" + ("-static" if self.static else "") + ("-h" if self.hadamard else "")

    def bits_per_weight(self, in_size: int) -> float:
        """Bits of one weight, its share of the float32 scale included."""
        return 8 + {"block": 32 / 128**2, "channel": 32 / in_size, "tensor": 0.0}[self.weights]


AnyScheme = Scheme | Fp8Scheme


def parse_scheme(word: str) -> AnyScheme:
    """The scheme a word stands for. Raises `ConfigError` for a word that is none."""
    return Fp8Scheme.parse(word) if word.startswith("fp8") else Scheme.parse(word)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Modules whose name fits `pattern` (`*` any text, `|` between alternatives) get `scheme`, or stay whole when it is None."""

    pattern: str
    scheme: str | None

    def fits(self, name: str) -> bool:
        """Whether the rule speaks of module `name`."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.pattern.split("|"))


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Rules in order. `rules[i].scheme` is a word for `parse_scheme`; written to and read from `config.json` as it stands."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        for rule in self.rules:
            if rule.scheme is not None:
                parse_scheme(rule.scheme)

    @classmethod
    def uniform(cls, scheme: str, *, head: str | None = None) -> "QuantSpec":
        """`scheme` for every matrix; the output head (and an embedding tied to it) gets `head`, or None: as everything else."""
        first = (Rule(pattern="head|embed", scheme=head),) if head else ()
        return cls(rules=(*first, Rule(pattern="*", scheme=scheme)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> "QuantSpec":
        """Raises `ConfigError` for unknown keys or schemes."""
        return from_mapping(cls, data, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        return {"rules": [{"pattern": r.pattern, "scheme": r.scheme} for r in self.rules]}

    def scheme_for(self, name: str) -> AnyScheme | None:
        """What module `name` gets. Raises `ConfigError` when no rule speaks of it."""
        for rule in self.rules:
            if rule.fits(name):
                return None if rule.scheme is None else parse_scheme(rule.scheme)
        raise ConfigError(f"no quantisation rule speaks of '{name}'; add one, or a last rule for '*'")

    @property
    def rounds_activations(self) -> bool:
        """Whether every packed matrix rounds what it reads to 8-bit integers."""
        schemes = [parse_scheme(rule.scheme) for rule in self.rules if rule.scheme is not None]
        return bool(schemes) and all(isinstance(scheme, Scheme) and not scheme.float_inputs for scheme in schemes)

    def check(self, names: Iterable[str]) -> None:
        """Raise `ConfigError` for a rule that fits none of `names`: a misspelt pattern must not pass as nothing to do."""
        names = list(names)
        for rule in self.rules:
            if not any(map(rule.fits, names)):
                raise ConfigError(f"the quantisation rule for '{rule.pattern}' fits no module; names look like {', '.join(names[:3])}")

"""Name tables: which file tensors make up which parameter, in both directions, as data.

Our parameters are always the fused form (q|k|v in one matrix, gate|up in one, experts stacked), so every file tensor is one *box* of one
parameter, possibly transposed; where a file stacks what belongs to several parameters, each of its rows is. A `Rule` says so for a pattern
of names; a `NameTable` turns rules and shapes into `Piece`s. The boxes of a parameter tile it exactly, so the same pieces serve loading
(file -> box) and saving (box -> file). Nothing is skipped: what no rule covers, what is missing and what does not fit are listed in the
plan. No tensor is touched here, only names and shapes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ernie45.errors import CheckpointError

Shape = tuple[int, ...]
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"(?<![0-9])\d+(?![0-9])")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One pattern of parameters and the file tensors that make it up.

    `{layer}`-like placeholders stand for numbers. A placeholder that only the files have counts the leading axis of the parameter
    (one file per expert), from `first` on. Several files lie side by side along `axis` of the parameter, with extents `sizes`, or equal
    shares.
    """

    ours: str
    files: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    axis: int = 0
    turned: bool = False
    """The file holds the matrix transposed (last two axes)."""
    either_way: bool = False
    """Uploads differ: the shape decides, and `turned` is assumed where it cannot (a square matrix)."""
    row: int | None = None
    """The file has a leading axis of `rows`, and this row of it is the parameter's; of one row a file without that axis is accepted."""
    rows: int = 1
    first: int = 0
    """The number of the file that holds the first entry of the counted axis."""

    def __post_init__(self) -> None:
        assert self.sizes is None or len(self.sizes) == len(self.files), self
        assert len({self._counted(file) for file in self.files}) == 1, self
        assert self.row is None or (0 <= self.row < self.rows and self.counted is None), self

    def _counted(self, file: str) -> tuple[str, ...]:
        inner = _PLACEHOLDER.findall(self.ours)
        return tuple(name for name in _PLACEHOLDER.findall(file) if name not in inner)

    @property
    def counted(self) -> str | None:
        """The placeholder that counts the leading axis, if any."""
        names = self._counted(self.files[0])
        assert len(names) <= 1, self
        return names[0] if names else None


@dataclass(frozen=True)
class Ignored:
    """File tensors that no parameter needs, and why that is right. `pattern` may have placeholders and end in `*`."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Piece:
    """One file tensor and its place: `ours[box]`, which has shape `shape` in the file (after a transpose if `turned`).

    Where `row` is a number, the piece is that row of the file tensor alone.
    """

    file: str
    ours: str
    box: tuple[tuple[int, int], ...]
    shape: Shape
    turned: bool
    whole: bool
    """The piece is the whole parameter."""
    row: int | None = None


@dataclass(frozen=True)
class WrongShape:
    """A file tensor whose shape is not the one its place needs."""

    file: str
    found: Shape
    needed: Shape


@dataclass(frozen=True)
class LoadPlan:
    """Where every file tensor goes, or why the files do not make the model."""

    pieces: tuple[Piece, ...]
    missing: tuple[str, ...] = ()
    """File names that a parameter needs and the files lack."""
    unexpected: tuple[str, ...] = ()
    """File names that no rule or no parameter takes."""
    wrong_shapes: tuple[WrongShape, ...] = ()
    uncovered: tuple[str, ...] = ()
    """Parameters for which this layout has no name."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """File name -> reason, for what is left out on purpose."""

    @property
    def complete(self) -> bool:
        """True when every parameter is filled and every file tensor is accounted for."""
        return not (self.missing or self.unexpected or self.wrong_shapes or self.uncovered)

    def explain(self) -> str:
        """The findings as indented lines, numbers folded into ranges; empty when complete."""
        lines = []
        for title, names in (
            ("missing", self.missing),
            ("not expected", self.unexpected),
            ("without a name in this layout", self.uncovered),
        ):
            if names:
                lines += [f"{title} ({len(names)}):", *_folded_lines(names)]
        if self.wrong_shapes:
            lines.append(f"of the wrong shape ({len(self.wrong_shapes)}):")
            kinds: dict[tuple[Shape, Shape], list[str]] = {}
            for wrong in self.wrong_shapes:
                kinds.setdefault((wrong.found, wrong.needed), []).append(wrong.file)
            for (found, needed), names in kinds.items():
                lines += [f"{line}: {list(found)} found, {list(needed)} needed" for line in _folded_lines(names)]
        return "\n".join(lines)


class NameTable:
    """The rules of one file layout."""

    def __init__(self, layout: str, rules: Sequence[Rule], ignored: Sequence[Ignored] = ()) -> None:
        self.layout = layout
        self.rules = tuple(rules)
        self.ignored = tuple(ignored)
        self._ours = [(_pattern(rule.ours), rule) for rule in self.rules]
        self._files = [(_pattern(file), file, rule) for rule in self.rules for file in rule.files]
        # a file counted from 64 on belongs to another rule than one counted from 0: the rule with the highest first number that it reaches
        self._files.sort(key=lambda entry: -entry[2].first)
        self._left_out = [(_pattern(entry.pattern), entry.reason) for entry in self.ignored]

    def pieces(self, name: str, shape: Shape) -> tuple[Piece, ...] | None:
        """The canonical file tensors of parameter `name`; None when no rule covers it. Their boxes tile the parameter exactly."""
        found = [(match, rule) for pattern, rule in self._ours if (match := pattern.fullmatch(name))]
        assert len(found) <= 1, f"{len(found)} rules cover {name}"
        if not found:
            return None
        match, rule = found[0]
        counter = rule.counted
        rows = range(shape[0]) if counter else (None,)
        sizes = rule.sizes or (shape[rule.axis] // len(rule.files),) * len(rule.files)
        assert sum(sizes) == shape[rule.axis], f"{name}: parts {sizes} do not fill axis {rule.axis} of {shape}"
        result = []
        for row in rows:
            begin = 0
            for file, size in zip(rule.files, sizes, strict=True):
                box = [(0, extent) for extent in shape]
                box[rule.axis] = (begin, begin + size)
                if row is not None:
                    box[0] = (row, row + 1)
                begin += size
                filled = _fill(file, match.groupdict() | ({counter: str(rule.first + row)} if counter and row is not None else {}))
                result.append(_piece(rule, filled, name, tuple(box), shape))
        return tuple(result)

    def save_plan(self, ours: Mapping[str, Shape]) -> tuple[Piece, ...]:
        """The file tensors that hold the parameters `ours` (name -> shape). Raises CheckpointError for one this layout has no name for."""
        result: list[Piece] = []
        uncovered = []
        for name, shape in ours.items():
            pieces = self.pieces(name, shape)
            if pieces is None:
                uncovered.append(name)
            else:
                result += pieces
        if uncovered:
            raise CheckpointError(f"the layout '{self.layout}' has no name for:\n" + "\n".join(_folded_lines(uncovered)))
        assert len({(piece.file, piece.row) for piece in result}) == len(result), "two parameters share a file tensor"
        return tuple(result)

    def load_plan(self, available: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> LoadPlan:
        """Match the file tensors `available` with the parameters `wanted` (both name -> shape)."""
        pieces: list[Piece] = []
        missing: list[str] = []
        wrong: list[WrongShape] = []
        uncovered: list[str] = []
        taken: set[tuple[str, int | None]] = set()
        for name, shape in wanted.items():
            canonical = self.pieces(name, shape)
            if canonical is None:
                uncovered.append(name)
                continue
            rule = next(rule for pattern, rule in self._ours if pattern.fullmatch(name))
            for piece in canonical:
                assert (piece.file, piece.row) not in taken, f"two parameters claim {piece.file}"
                taken.add((piece.file, piece.row))
                if piece.file not in available:
                    missing.append(piece.file)
                    continue
                fitted = _fit(rule, piece, tuple(available[piece.file]))
                if fitted is None:
                    wrong.append(WrongShape(piece.file, tuple(available[piece.file]), piece.shape))
                else:
                    pieces.append(fitted)
        found = {file for file, _ in taken}
        left = [name for name in available if name not in found]
        ignored = {name: reason for name in left if (reason := self.reason_to_ignore(name)) is not None}
        unexpected = tuple(name for name in left if name not in ignored)
        # a tensor that several parameters share is missing, or wrong, once
        return LoadPlan(tuple(pieces), tuple(dict.fromkeys(missing)), unexpected, tuple(dict.fromkeys(wrong)), tuple(uncovered), ignored)

    def reason_to_ignore(self, file: str) -> str | None:
        """Why a file tensor may be left out; None when nothing says so."""
        return next((reason for pattern, reason in self._left_out if pattern.fullmatch(file)), None)

    def ours_of(self, file: str) -> str | None:
        """The parameter a file tensor belongs to, whether or not a model has it; None for a name no rule knows."""
        for pattern, _, rule in self._files:
            match = pattern.fullmatch(file)
            if match and (rule.counted is None or int(match[rule.counted]) >= rule.first):
                return _fill(rule.ours, match.groupdict())
        return None


def fold_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names with their numbers folded into ranges, and how many each line stands for: `a.{3..27}.b`. Exact: no name is added or lost."""
    groups: dict[tuple[str, ...], dict[tuple[str, ...], int]] = {}
    for name in names:
        text = tuple(_NUMBER.split(name))
        groups.setdefault(text, {})[tuple(_NUMBER.findall(name))] = 1
    result = []
    for text, rows in groups.items():
        for place in reversed(range(len(text) - 1)):
            rows = _fold_place(rows, place)
        for numbers, count in rows.items():
            result.append(("".join(a + b for a, b in zip(text, (*numbers, ""), strict=True)), count))
    return result


def _fold_place(rows: Mapping[tuple[str, ...], int], place: int) -> dict[tuple[str, ...], int]:
    """Join rows that differ only in one place and have a plain number there."""
    joined: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[int, int]] = {}
    for numbers, count in rows.items():
        joined.setdefault((numbers[:place], numbers[place + 1 :]), {})[int(numbers[place])] = count
    return {(*before, _ranges(sorted(found)), *after): sum(found.values()) for (before, after), found in joined.items()}


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: 5, {3..27}, {0,2,4..9}."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    if len(numbers) == 1:
        return str(numbers[0])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def _folded_lines(names: Iterable[str], limit: int = 40) -> list[str]:
    """Indented lines for an error text; a hostile file does not get to fill the screen."""
    folded = fold_names(names)
    lines = [
        f"  {text!r}" if not text.isprintable() else f"  {text}" + (f" ({count})" if count > 1 else "") for text, count in folded[:limit]
    ]
    if len(folded) > limit:
        lines.append(f"  and {sum(count for _, count in folded[limit:])} more")
    return lines


def _pattern(text: str) -> re.Pattern[str]:
    """Placeholders match plain decimal numbers without leading zeros; `*` at the end matches anything."""
    parts = _PLACEHOLDER.split(text.removesuffix("*"))
    body = "".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>0|[1-9][0-9]*)" for i, part in enumerate(parts))
    return re.compile(body + (".*" if text.endswith("*") else ""), re.DOTALL)


def _fill(text: str, numbers: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: numbers[match[1]], text)


def _piece(rule: Rule, file: str, ours: str, box: tuple[tuple[int, int], ...], shape: Shape) -> Piece:
    """The canonical piece: the shape the file should have when it is written by these rules."""
    extents = [end - begin for begin, end in box[1 if rule.counted else 0 :]]
    if rule.turned:
        extents[-2:] = extents[:-3:-1]
    if rule.row is not None:
        extents.insert(0, rule.rows)
    whole = all(pair == (0, extent) for pair, extent in zip(box, shape, strict=True))
    return Piece(file, ours, box, tuple(extents), rule.turned, whole, rule.row)


def _fit(rule: Rule, piece: Piece, found: Shape) -> Piece | None:
    """The piece as the file really has it, or None when it cannot be that."""
    if found == piece.shape:
        return piece
    if rule.rows == 1 and rule.row is not None and found == piece.shape[1:]:
        return Piece(piece.file, piece.ours, piece.box, found, piece.turned, piece.whole)
    turned = (*piece.shape[:-2], *piece.shape[:-3:-1])
    if rule.either_way and found == turned:
        return Piece(piece.file, piece.ours, piece.box, found, not piece.turned, piece.whole)
    return None

"""Chat templates that come with a model folder, rendered in a sandbox with bounds.

The template is a stranger's program. It runs in jinja2's immutable sandbox (no attribute that begins with an underscore, no way to files),
and here it is also bounded: steps (loop turns and calls), seconds, size of any text it builds, and the filters it may use. A template
that passes a bound, fails, or calls `raise_exception` is a TokenizerError that says which.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ernie45.errors import TokenizerError

MAX_TEMPLATE = 2**20
"""The longest template read, in characters; the longest known are near 30,000."""

_FILTERS = frozenset(
    [
        "abs",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "escape",
        "e",
        "first",
        "float",
        "forceescape",
        "int",
        "items",
        "join",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "replace",
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "sort",
        "string",
        "strip",
        "title",
        "tojson",
        "trim",
        "truncate",
        "unique",
        "upper",
    ]
)
_GROWING_METHODS = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"})
"""Methods of str whose result can be huge for small arguments; chat templates have no use for them."""


@dataclass(frozen=True)
class Bounds:
    """What a template may use: steps, seconds, and characters of any text or items of any list it builds."""

    steps: int = 200_000
    seconds: float = 5.0
    size: int = 8 * 2**20


class _Refused(Exception):
    """The template passed a bound or called raise_exception; the text says which."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks what the model is to learn, between two marker characters."""

    tags = {"generation"}  # noqa: RUF012 - the name and form jinja2 asks for

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        assert isinstance(body, list)
        marks = [nodes.Output([nodes.Name(name, "load")]).set_lineno(line) for name in ("_learned_begins", "_learned_ends")]
        return nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with bounds. One environment serves one render: it counts."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._bounds = bounds
        self._steps = 0
        self._deadline = time.monotonic() + bounds.seconds
        self.filters = {name: self._bounded(self.filters[name]) for name in _FILTERS if name in self.filters}
        self.filters |= {"tojson": _tojson, "join": self._join, "replace": self._replace, "_turns": self._turns, "_glue": self._glue}
        allowed: dict[str, Any] = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        allowed["raise_exception"] = _raise_exception
        allowed["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals = allowed

    def tick(self, steps: int = 1) -> None:
        """Counts steps. Raises when there were too many, or the time is over."""
        self._steps += steps
        if self._steps > self._bounds.steps:
            raise _Refused(f"it takes more than {self._bounds.steps:,} steps")
        if time.monotonic() > self._deadline:
            raise _Refused(f"it takes more than {self._bounds.seconds:g} seconds")

    def sized(self, value: Any) -> Any:
        """The value, if it is no larger than allowed."""
        if isinstance(value, str | list | tuple | bytes) and len(value) > self._bounds.size:
            raise _Refused(f"it builds a text or list of more than {self._bounds.size:,} characters or items")
        if isinstance(value, int) and value.bit_length() > 4096:
            raise _Refused("it builds a number of more than 4,096 bits")
        return value

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            if loop.recursive:
                raise jinja2.TemplateSyntaxError("recursive loops are not allowed", loop.lineno)
            loop.iter = nodes.Filter(loop.iter, "_turns", [], [], None, None, lineno=loop.lineno)
        _replace_nodes(
            tree, nodes.Concat, lambda node: nodes.Filter(nodes.List(node.nodes), "_glue", [], [], None, None, lineno=node.lineno)
        )
        for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
            if tree.find(kind) is not None:
                raise jinja2.TemplateSyntaxError("a chat template may not load others", 1)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in _GROWING_METHODS) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Refuses str.format, which jinja2's sandbox allows: a width in it is memory."""
        return

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        owner, method = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and method == "replace" and len(args) >= 2:
            self._check_replace(owner, args[0], args[1])
        elif isinstance(owner, str) and method == "join" and args:
            return self._join(args[0], owner)
        return self.sized(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        for text, count in ((left, right), (right, left)):
            if (
                operator == "*"
                and isinstance(text, str | list | tuple)
                and isinstance(count, int)
                and len(text) * count > self._bounds.size
            ):
                raise _Refused(f"it builds a text or list of more than {self._bounds.size:,} characters or items")
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64):
            raise _Refused("it raises a number to a power over 64")
        if operator == "%" and isinstance(left, str):
            raise _Refused("it formats text with %, which is not allowed")
        return self.sized(super().call_binop(context, operator, left, right))

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts as a step and whose argument is already bounded, so its result is too."""
        if getattr(function, "jinja_pass_arg", None) is not None:  # the caller's context comes first: jinja2 must see the function itself
            return function

        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return self.sized(function(*args, **kwargs))

        return bounded

    def _turns(self, value: Any) -> Any:
        """What a loop walks over, counting its turns; sized things keep their type, since `loop.length` asks for it."""
        if hasattr(value, "__len__"):
            self.tick(len(value) + 1)
            return value
        return self._counted(value)

    def _counted(self, value: Any) -> Iterator[Any]:
        for item in value:
            self.tick()
            yield item

    def _glue(self, parts: list[Any]) -> str:
        return self._join(parts, "")

    def _join(self, value: Any, d: Any = "", attribute: str | None = None) -> str:
        items = [str(item if attribute is None else self.getitem(item, attribute)) for item in self._turns(value)]
        if sum(map(len, items)) + len(str(d)) * len(items) > self._bounds.size:
            raise _Refused(f"it builds a text of more than {self._bounds.size:,} characters")
        return str(d).join(items)

    def _replace(self, text: Any, old: Any, new: Any, count: int = -1) -> str:
        self._check_replace(str(text), old, new)
        return str(text).replace(str(old), str(new), -1 if count is None else count)

    def _check_replace(self, text: str, old: Any, new: Any) -> None:
        self.tick()
        if len(text) + text.count(str(old)) * len(str(new)) > self._bounds.size:
            raise _Refused(f"it builds a text of more than {self._bounds.size:,} characters")


def render(source: str, variables: Mapping[str, Any], bounds: Bounds | None = None) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Renders a chat template: (text, spans of it inside `{% generation %}` blocks).

    `variables` are plain data: messages, tools, add_generation_prompt, named tokens, ...
    Raises TokenizerError when the template is wrong, refuses the conversation (`raise_exception`), or passes a bound.
    """
    bounds = bounds or Bounds()
    if len(source) > MAX_TEMPLATE:
        raise TokenizerError(f"the chat template has {len(source):,} characters; more than {MAX_TEMPLATE:,} are not read")
    begins, ends = _unused(source, variables, 2)
    environment = _Environment(bounds)
    try:
        pieces, size = [], 0
        template = environment.from_string(source)
        for piece in template.generate(**variables, _learned_begins=begins, _learned_ends=ends):
            environment.tick()
            size += len(piece)
            if size > bounds.size:
                raise _Refused(f"it writes more than {bounds.size:,} characters")
            pieces.append(piece)
    except (_Refused, jinja2.TemplateError) as error:
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TokenizerError(f"the folder's chat template cannot render this conversation{line}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError, IndexError, MemoryError) as error:
        raise TokenizerError(f"the folder's chat template fails on this conversation: {type(error).__name__}: {error}") from error
    return _cut_marks("".join(pieces), begins, ends)


def private_characters(text: str, count: int) -> list[str]:
    """`count` private-use characters that do not occur in a text: marks nobody can have written."""
    taken = set(text)
    return [char for code in range(0x10FFFD, 0x10F000, -1) if (char := chr(code)) not in taken][:count]


def _unused(source: str, variables: Mapping[str, Any], count: int) -> list[str]:
    return private_characters(source + json.dumps(variables, ensure_ascii=False, default=str), count)


def _cut_marks(text: str, begins: str, ends: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    plain, at, opened, spans = [], 0, -1, []
    for part in text.replace(ends, begins + ends).split(begins):
        if part.startswith(ends):
            part = part[1:]
            if opened >= 0:
                spans.append((opened, at))
            opened = -1
        elif plain:
            opened = at
        plain.append(part)
        at += len(part)
    return "".join(plain), tuple(spans)


def _replace_nodes(tree: nodes.Node, kind: type[nodes.Node], make: Callable[[Any], nodes.Node]) -> None:
    for field in tree.fields:
        value = getattr(tree, field)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, nodes.Node):
                _replace_nodes(child, kind, make)
        if isinstance(value, kind):
            setattr(tree, field, make(value))
        elif isinstance(value, list):
            setattr(tree, field, [make(child) if isinstance(child, kind) else child for child in value])


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    """As the field's templates expect: JSON as it is, without HTML escapes."""
    if isinstance(indent, int) and indent > 16:
        raise _Refused("it indents JSON by more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))

"""Answers that follow a grammar: which tokens may come next. No tensors here.

A grammar is text that llguidance reads: a Lark grammar with JSON schemas and regular expressions inside. It is compiled under limits, in
milliseconds, and a matcher then walks along with the answer. Whoever takes grammars from strangers calls `Grammars.check` first.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ernie45.engine.grammar_size import check_size
from ernie45.errors import MissingExtra, RequestError
from ernie45.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_GRAMMAR = 1_000_000  # characters: compiling is linear at best
_KEPT = 64  # tokenizers prepared for a set of end ids (there is one for most models, two for a few), and grammars
_KEPT_SIZE = 65_536  # characters of a grammar that is kept: 64 of them are a few dozen megabytes at worst
_Key = tuple[str, tuple[int, ...]]
"""A grammar, and the ids that may end its answers."""


class Matcher:
    """Walks along one answer. `allowed` before each token, `consume` after it."""

    def __init__(self, inner: "LLMatcher", on_break: Callable[[], None] = lambda: None) -> None:
        """on_break: called when the grammar passes its limits on the way."""
        self._inner = inner
        self._on_break = on_break

    @property
    def over(self) -> bool:
        """The grammar is complete and only the end of the answer may follow (or it broke on its limits)."""
        return self._inner.is_stopped()

    @property
    def accepting(self) -> bool:
        """The answer could end here."""
        return self._inner.is_accepting()

    def allowed(self) -> bytes:
        """One bit per id of the vocabulary, lowest bit first: whether the id may come next."""
        mask = self._inner.compute_bitmask()
        self._look()
        return mask

    def consume(self, token: int) -> bool:
        """Takes in the token that was chosen. False when the grammar does not allow it, or its limits were passed."""
        taken = self._inner.consume_token(token)
        if not taken:
            self._look()
        return taken

    def agrees(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, could come next; nothing is taken in."""
        return self._inner.validate_tokens(list(tokens))

    def take_back(self, count: int) -> None:
        """Forgets the newest tokens it took in."""
        self._inner.rollback(count)

    def _look(self) -> None:
        if self._inner.is_error() and not self._inner.get_error().startswith("Parser Error"):  # that is a token's fault, not the grammar's
            self._on_break()


class Grammars:
    """Compiles grammars for one tokenizer. May be used from several threads.

    A front checks a grammar and an engine in another process compiles it again: 1 ms for a small schema, 50 ms for one of 28,000
    characters. The newest are kept, so what is asked often is compiled once on either side and then copied, in under 0.1 ms.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prepared: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._passed: OrderedDict[_Key, bool] = OrderedDict()
        self._compiled: OrderedDict[_Key, Any] = OrderedDict()
        self._broken: OrderedDict[_Key, bool] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, grammar: str, field: str, end_ids: Sequence[int]) -> None:
        """Raises `RequestError` naming `field` when the grammar cannot be compiled within the limits."""
        if len(grammar) > MAX_GRAMMAR:
            raise RequestError(f"{field} makes a grammar of {len(grammar):,} characters; at most {MAX_GRAMMAR:,} are compiled", field)
        check_size(grammar, field)
        key = (grammar, tuple(end_ids))
        if self._known(self._passed, key):
            return
        llguidance = _library()
        limits = _limits(llguidance)
        wrong = llguidance.LLMatcher.validate_grammar(grammar, self._for(end_ids), limits=limits)
        if wrong and not wrong.startswith("WARNING"):
            raise RequestError(f"{field} cannot be compiled: {_first_lines(wrong)}", field)
        inner = llguidance.LLMatcher(self._for(end_ids), grammar, log_level=0, limits=limits)
        inner.compute_bitmask()  # much is only built when the first token is asked for; an engine would do it while all others wait
        if inner.is_error():
            raise RequestError(f"{field} is too complex: {_first_lines(inner.get_error())}", field)
        self._keep(self._passed, key, True)

    def matcher(self, grammar: str, end_ids: Sequence[int]) -> Matcher:
        """A matcher at the beginning of an answer that one of `end_ids` ends. Raises `RequestError` when it cannot be compiled."""
        if len(grammar) > MAX_GRAMMAR:
            raise RequestError(f"the grammar has {len(grammar):,} characters; at most {MAX_GRAMMAR:,} are compiled", "grammar")
        key = (grammar, tuple(end_ids))
        if self._known(self._broken, key):  # copies share what was built on the way: asked again, it would cost more each time
            raise RequestError("the grammar is too complex: it passed its limits in the middle of an answer", "grammar")
        if (known := self._known(self._compiled, key)) is not None:
            return self._matcher(known, key)
        llguidance = _library()
        inner = llguidance.LLMatcher(self._for(end_ids), grammar, log_level=0, limits=_limits(llguidance))
        if inner.is_error():
            raise RequestError(f"the grammar cannot be compiled: {_first_lines(inner.get_error())}", "grammar")
        self._keep(self._compiled, key, inner)
        return self._matcher(inner, key)

    def _matcher(self, inner: Any, key: _Key) -> Matcher:
        return Matcher(inner.deep_copy(), lambda: self._keep(self._broken, key, True))

    def _known(self, kept: OrderedDict[_Key, Any], key: _Key) -> Any:
        with self._lock:
            if key in kept:
                kept.move_to_end(key)
            return kept.get(key)

    def _keep(self, kept: OrderedDict[_Key, Any], key: _Key, value: Any) -> None:
        if len(key[0]) > _KEPT_SIZE:
            return
        with self._lock:
            kept[key] = value
            if len(kept) > _KEPT:
                kept.popitem(last=False)

    def _for(self, end_ids: Sequence[int]) -> Any:
        """The tokenizer as llguidance holds it (half a second for a large vocabulary, once)."""
        key = tuple(sorted(set(end_ids)))
        if not key:
            raise RequestError("a grammar needs an end-of-text id, and this model has none", "grammar")
        with self._lock:
            if key not in self._prepared:
                llguidance = _library()
                self._prepared[key] = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Face(self._tokenizer, key)), eos_token=list(key))
                if len(self._prepared) > _KEPT:
                    self._prepared.popitem(last=False)
            self._prepared.move_to_end(key)
            return self._prepared[key]


class _Face:
    """A tokenizer as llguidance wants to see it. Control tokens are special: no text of a grammar ever spells one."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.control_ids | set(end_ids)
        self.eos_token_id = end_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted(special)
        self.tokens = [tokenizer.token_of(id).encode() if id in special else tokenizer.bytes_of(id) for id in range(tokenizer.vocab_size)]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text, start=False)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtra("llguidance", "serve") from None
    return llguidance


def _limits(llguidance: Any) -> Any:
    """The library's own limits on items, lexer fuel and grammar size: what passes them compiles in well under a second.

    Fuel of a step is spent inside the engine, where one answer's 10 ms are everybody's: `b*(a{1000}){1000}` took 10 ms with 20,000.
    """
    return llguidance.LLParserLimits(max_grammar_size=200_000, initial_lexer_fuel=200_000, step_lexer_fuel=20_000)


def _first_lines(text: str) -> str:
    return " ".join(text.split())[:300]

"""An engine without weights: the real scheduler and pages, and tokens that are a function of place and seed. No tensors here.

It answers as `Engine` does, so that everything above it (queues, cancelling, streaming, parsing) is tested, and its overhead measured,
without a model. Its vocabulary is bytes. A prompt that holds «text» is answered with exactly that text.
"""

import hashlib
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ernie45.engine.grammar import Grammars, Matcher
from ernie45.engine.output import BankLoad, Output, TokenLogprobs
from ernie45.engine.request import FinishReason, Request
from ernie45.engine.scheduler import Load, Scheduler, SchedulerConfig
from ernie45.errors import RequestError
from ernie45.tokens.special import AddedToken, DeclaredTokens
from ernie45.tokens.template import ChatTemplate, family_template
from ernie45.tokens.tokenizer import Tokenizer
from ernie45.tokens.vocabulary import Vocabulary

_NAMED = ("<unk>", "<s>", "</s>")
_TAGS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<think>",
    "</think>",
    "<response>",
    "</response>",
    "<tool_call>",
    "</tool_call>",
)
_FIRST_BYTE = len(_NAMED)
_CLOSERS = b'"}]0,:'  # what a grammar is given first where the script has nothing to say: it soon ends so
WIDTH = 16  # of its embeddings


def fake_tokenizer() -> Tokenizer:
    """Ids 0 to 2 are <unk>, <s> and </s>, then 256 bytes, then the tags of the ERNIE formats as one id each."""
    ids = {name: id for id, name in enumerate(_NAMED)} | {f"<0x{b:02X}>": _FIRST_BYTE + b for b in range(256)}
    vocabulary = Vocabulary(
        encode=lambda text: [_FIRST_BYTE + b for b in text.encode()],
        ids=ids,
        bytes_of={id: name.encode() for id, name in enumerate(_NAMED)} | {_FIRST_BYTE + b: bytes([b]) for b in range(256)},
        prefix="none",
        control=frozenset(range(len(_NAMED))),
        unknown=0,
    )
    tags = {tag: AddedToken(tag, _FIRST_BYTE + 256 + n, special=tag.startswith("<|")) for n, tag in enumerate(_TAGS)}
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(vocabulary, DeclaredTokens(named, frozenset(_NAMED), tags))


def fake_template(tokenizer: Tokenizer, chat_format: str | None = None) -> ChatTemplate:
    """ChatML, or another known format."""
    return family_template(chat_format or "chatml", tokenizer)


def scripted(prompt: str) -> str | None:
    """The answer that a prompt asks for by «text», the last one counting; None when it does not."""
    start = prompt.rfind("«")
    end = prompt.find("»", start)
    return prompt[start + 1 : end] if start >= 0 and end > start else None


@dataclass(slots=True)
class _Speaker:
    """What the fake remembers of one request: the ids it is to say, if any, and how far it is."""

    request: Request
    seed: int
    script: list[int] | None
    matcher: Matcher | None
    said: list[int] = field(default_factory=list)


class FakeEngine:
    """The face of `engine.core.Engine`. step_seconds: how long each step takes."""

    def __init__(
        self,
        limits: SchedulerConfig,
        *,
        step_seconds: float = 0.0,
        new_seed: Callable[[], int] = lambda: secrets.randbits(63),
        fails: Callable[[Request], bool] = lambda request: False,
    ) -> None:
        """fails: whether a request's sampling breaks, as logits that are not numbers would."""
        self.limits = limits
        self.tokenizer = fake_tokenizer()
        self._grammars = Grammars(self.tokenizer)
        self._scheduler = Scheduler(limits)
        self._step_seconds = step_seconds
        self._new_seed = new_seed
        self._fails = fails
        self._speakers: dict[str, _Speaker] = {}

    @property
    def idle(self) -> bool:
        return self._scheduler.idle

    @property
    def load(self) -> Load:
        return self._scheduler.load

    def submit(self, request: Request) -> None:
        """As `Engine.submit`."""
        request.check_vocabulary(self.tokenizer.vocab_size)
        matcher = self._grammars.matcher(request.grammar, sorted(request.end_ids)) if request.grammar else None
        self._scheduler.add(request)
        seed = self._new_seed() if request.params.seed is None else request.params.seed
        if request.adapter:  # another voice for each
            seed ^= int.from_bytes(hashlib.blake2b(request.adapter.encode(), digest_size=4).digest())
        text = scripted(self.tokenizer.decode(request.prompt, skip_special=False))
        script = None if text is None else self.tokenizer.encode(text, allow_special=True)
        if script is not None and self.tokenizer.id_of("</think>") in request.prompt[-3:]:
            script = _behind_thinking(script, self.tokenizer)
        self._speakers[request.id] = _Speaker(request, seed, script, matcher)

    def cancel(self, request_id: str) -> bool:
        """As `Engine.cancel`."""
        self._speakers.pop(request_id, None)
        return self._scheduler.cancel(request_id)

    def step(self) -> tuple[Output, ...]:
        """As `Engine.step`."""
        plan = self._scheduler.plan()
        if not plan.rows:
            return ()
        if self._step_seconds:
            time.sleep(self._step_seconds)
        sampled: dict[str, tuple[int, ...]] = {}
        failed: dict[str, FinishReason] = {}
        for row in plan.rows:
            speaker = self._speakers[row.request_id]
            if self._fails(speaker.request):
                failed[row.request_id] = FinishReason.error
            elif row.samples:
                token = self._next(speaker)
                if speaker.matcher is not None and not speaker.matcher.consume(token):
                    failed[row.request_id] = FinishReason.grammar
                speaker.said.append(token)
                sampled[row.request_id] = (token,)
        outputs = []
        for progress in self._scheduler.commit(plan, sampled, failed):
            speaker = self._speakers[progress.request_id]
            outputs.append(self._output(speaker, progress.tokens, progress.finish, progress.cached_tokens))
            if progress.finish is not None:
                del self._speakers[progress.request_id]
        return tuple(outputs)

    def embed(self, tokens: Sequence[int], adapter: str = "") -> list[float]:
        """A vector of length 1 that depends on all tokens."""
        if not tokens:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        digest = hashlib.shake_256(adapter.encode() + struct.pack(f"<{len(tokens)}I", *tokens)).digest(WIDTH)
        values = [byte - 127.5 for byte in digest]
        norm = sum(value * value for value in values) ** 0.5
        return [value / norm for value in values]

    def experts_load(self) -> tuple[BankLoad, ...]:
        """As `Engine.experts_load`: it has none."""
        return ()

    def verify(self) -> None:
        """As `Engine.verify`."""
        self._scheduler.check()

    def _next(self, speaker: _Speaker) -> int:
        place, request = len(speaker.said), speaker.request
        ends = sorted(request.end_ids)
        if speaker.script is not None:
            wanted = speaker.script[place] if place < len(speaker.script) else (ends[0] if ends else self._letter(speaker.seed, place))
        else:
            wanted = self._letter(speaker.seed, place)
        if speaker.matcher is None:
            return wanted
        bits = speaker.matcher.allowed()
        choices = [wanted, *(ends if speaker.matcher.accepting else ()), *(_FIRST_BYTE + b for b in _CLOSERS)]
        for token in (*choices, *range(self.tokenizer.vocab_size)):
            if bits[token // 8] >> token % 8 & 1:
                return token
        return wanted

    def _letter(self, seed: int, place: int) -> int:
        digest = hashlib.blake2b(struct.pack("<qq", seed, place), digest_size=2).digest()
        return _FIRST_BYTE + b"abcdefghijklmnopqrstuvwxyz      "[digest[0] % 32]

    def _output(self, speaker: _Speaker, tokens: tuple[int, ...], finish: FinishReason | None, cached: int) -> Output:
        params = speaker.request.params
        logprobs = tuple(_logprobs(token, params.logprobs) for token in tokens) if params.logprobs is not None else ()
        scored: tuple[TokenLogprobs, ...] = ()
        if params.prompt_logprobs is not None and len(speaker.said) == 1:
            scored = tuple(_logprobs(token, params.prompt_logprobs) for token in speaker.request.prompt[1:])
        return Output(speaker.request.id, tokens, logprobs, scored, finish, cached)


def _logprobs(token: int, count: int) -> TokenLogprobs:
    """-1 for the token itself and one less for each further id."""
    return TokenLogprobs(token, -1.0, tuple((token + n if n == 0 else (token + n) % 256, -1.0 - n) for n in range(count)))


def _behind_thinking(script: list[int], tokenizer: Tokenizer) -> list[int]:
    """What is left of a scripted reply when its thinking was closed by a budget."""
    close = tokenizer.id_of("</think>")
    return script[script.index(close) + 1 :] if close in script else script

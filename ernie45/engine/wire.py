"""Messages between a front and an engine in another process: typed values as MessagePack, four bytes of length before each.

Nothing here can carry code: what arrives is checked against these types, or refused. No tensors.
"""

import struct
from typing import Any, TypeVar

try:
    import msgspec
except ImportError as error:
    from ernie45.errors import MissingExtra

    raise MissingExtra("msgspec", "serve") from error

from ernie45.engine.output import BankLoad, Output
from ernie45.engine.request import Request
from ernie45.engine.scheduler import Load, SchedulerConfig
from ernie45.engine.speculate import DRAFT_TOKENS
from ernie45.models.memory import MemoryPlan
from ernie45.tokens.pictures import PixelRules

MAX_FRAME = 256 << 20  # bytes; the longest prompt of the longest model is a few megabytes
_HEAD = struct.Struct(">I")
T = TypeVar("T")


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine process is to load, and how. None = automatic.

    text_folder   an empty folder that may be filled with tokenizer files, for a model (GGUF) that has none of its own
    adapters      the folder of adapters, empty for none
    cpus          processors that the process may use; empty: those it was started with
    step_seconds  of the fake engine
    """

    model: str
    text_folder: str
    dtype: str = "auto"
    threads: int | str = "auto"
    pin: str = "off"
    huge_pages: str = "off"
    cpus: tuple[int, ...] = ()
    page_size: int = 32
    num_pages: int | None = None
    max_length: int | None = None
    token_budget: int = 512
    idle_budget: int | None = None
    max_running: int = 32
    prefix_sharing: bool = True
    text_only: bool = False
    adapters: str = ""
    max_adapters: int = 8
    adapter_bytes: int = 1 << 30
    quantize: str | None = None
    kv: str = "whole"
    speculative: str = "off"
    draft_model: str | None = None
    draft_tokens: int = DRAFT_TOKENS
    step_seconds: float = 0.0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded. text_folder: where tokenizer and template are, empty for the fake. settings: for people to read.

    rules: how pictures are made for it; None when it sees none. speculative: who drafts for it. threads: how many compute it, on `cpus`
    where they are pinned (else empty). memory: the plan, bytes by part.
    """

    name: str
    text_folder: str
    vocab_size: int
    width: int
    eos_ids: tuple[int, ...]
    limits: SchedulerConfig
    settings: dict[str, str]
    rules: PixelRules | None = None
    max_adapters: int = 8
    speculative: str = "off"
    parameters: int = 0
    active_parameters: int = 0
    dtype: str = ""
    threads: int = 0
    cpus: tuple[int, ...] = ()
    memory: dict[str, int] = {}


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A request to run."""

    request: Request


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """A request to end."""

    id: str


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    """A text to turn into a vector."""

    id: str
    tokens: tuple[int, ...]
    adapter: str = ""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How far loading is."""

    stage: str
    done: int
    total: int


class Planned(msgspec.Struct, frozen=True, tag="planned"):
    """What a model that is about to be read will take; its reading waits for `Grant`. text_folder: as in `EngineInfo`."""

    plan: MemoryPlan
    text_folder: str


class Grant(msgspec.Struct, frozen=True, tag="grant"):
    """How many bytes an engine may take, weights and all."""

    size: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Loaded: requests may come."""

    info: EngineInfo


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """It could not be loaded, and why. mistake: the caller can mend it."""

    text: str
    mistake: bool


class Stepped(msgspec.Struct, frozen=True, tag="stepped"):
    """A step of the engine: what it brought, how busy it is, how long it took, whether it broke."""

    outputs: tuple[Output, ...]
    load: Load
    seconds: float
    broke: bool = False


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A request that the engine did not take."""

    id: str
    text: str
    field: str | None


class Embedded(msgspec.Struct, frozen=True, tag="embedded"):
    """A text as a vector."""

    id: str
    vector: tuple[float, ...]


class Chosen(msgspec.Struct, frozen=True, tag="chosen"):
    """How often each expert was chosen since the start."""

    layers: tuple[BankLoad, ...]


ToEngine = Grant | Submit | Cancel | Embed
FromEngine = Loading | Planned | Ready | LoadFailed | Stepped | Refused | Embedded | Chosen

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {
    EngineSpec: msgspec.msgpack.Decoder(EngineSpec),
    ToEngine: msgspec.msgpack.Decoder(ToEngine),
    FromEngine: msgspec.msgpack.Decoder(FromEngine),
}


def pack(message: Any) -> bytes:
    """A message as a frame."""
    data = _ENCODER.encode(message)
    return _HEAD.pack(len(data)) + data


class Unpacker:
    """Bytes as they come -> messages of one kind (a key of `_DECODERS`)."""

    def __init__(self, kind: Any) -> None:
        self._decoder = _DECODERS[kind]
        self._held = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete. Raises `msgspec.ValidationError` or `ValueError` for what is no message: the peer is broken."""
        self._held += data
        messages = []
        while len(self._held) >= _HEAD.size:
            (size,) = _HEAD.unpack_from(self._held)
            if size > MAX_FRAME:
                raise ValueError(f"a frame of {size:,} bytes; at most {MAX_FRAME:,} are read")
            end = _HEAD.size + size
            if len(self._held) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._held)[_HEAD.size : end].tobytes()))
            del self._held[:end]
        return messages

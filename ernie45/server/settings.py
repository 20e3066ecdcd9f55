"""Settings of the server, and the one table of limits. Every number here is a flag of `ernie serve` and a row of its guide."""

import dataclasses
import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ernie45.engine.speculate import DRAFT_TOKENS
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.errors import ConfigError
from ernie45.server.remote import Origin, read_origins

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str, name: str) -> int:
    """A size such as 20GiB, 1.5 GB or 1000000. Raises `ConfigError` that names the setting."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]{0,3})", text.strip())
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found and found[2].upper() in _UNITS else 0
    if size < 1:
        raise ConfigError(f"{name} is '{text[:40]}'; write a size, such as 20GiB or 500MB")
    return size


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for, and how long things may take. Passing one is a 4xx or 5xx that names it."""

    body_bytes: int = 4 << 20
    """Bytes of a request's body; for models that see, images_bytes come on top."""
    images_bytes: int = 48 << 20
    """Bytes that the images and videos in a body may take there."""
    images: int = 16
    """Images and videos of a conversation."""
    image_pixels: int = 50_000_000
    """Pixels of an image, width times height."""
    media_seconds: float = 10.0
    """Time to fetch all images and videos that a conversation names by address (media_hosts)."""
    json_depth: int = 64
    """How deep a body may be nested."""
    messages: int = 4096
    """Messages of a conversation."""
    prompts: int = 128
    """Prompts of one completion or embedding request."""
    n: int = 16
    """Answers to one prompt."""
    stop: int = 16
    """Stop strings."""
    stop_characters: int = 256
    """Characters of one stop string."""
    stop_token_ids: int = 128
    """Stop ids."""
    logit_bias: int = 1024
    """Entries of logit_bias."""
    bad_words: int = 128
    """Bad words."""
    tool_definitions: int = 128
    """Tools of one request."""
    schema_bytes: int = 256 << 10
    """Bytes of one schema, regular expression or grammar."""
    grammar_seconds: float = 5.0
    """Time to compile a grammar."""
    read_seconds: float = 30.0
    """Time for a client to send a request."""
    write_seconds: float = 30.0
    """Time for a client to take a piece of an answer; then its answer is stopped and the connection closed."""
    resume_seconds: float = 60.0
    """Longest that a stream may wait for its client to come back (X-Resume-Seconds)."""
    resume_bytes: int = 1 << 20
    """Bytes of a stream that are kept for a client that comes back; then the answer waits."""
    resumable: int = 256
    """Streams that can be taken up again at the same time; more are given without."""
    request_seconds: float = 3600.0
    """Time for a whole request, waiting included."""
    queue: int = 256
    """Requests that may wait for the model; more get 503."""
    queue_seconds: float = 120.0
    """Time a request may wait for the model; then it gets 504."""
    connections: int = 1024
    """Connections at the same time."""
    file_bytes: int = 200 << 20
    """Bytes of an uploaded file."""
    upload_seconds: float = 600.0
    """Time for a client to send a file."""
    files: int = 10_000
    """Files that a key may keep."""
    storage_bytes: int = 4 << 30
    """Bytes of files that a key may keep; results of batches count, and are never refused."""
    batch_lines: int = 50_000
    """Requests of one batch."""
    unfinished_batches: int = 64
    """Batches of a key that are not finished."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if not value > 0:
                raise ConfigError(f"limits.{item.name} must be above 0, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class EngineSettings(ThreadSettings):
    """How the engine runs; None = automatic."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto takes the one this processor is fast at."""
    page_size: int = 32
    """Tokens per page of the cache."""
    num_pages: int | None = None
    """Pages of the cache; automatic: half of the free memory, or less when less is enough."""
    max_length: int | None = None
    """Longest sequence, prompt and answer; automatic: what the model knows."""
    token_budget: int = 512
    """Tokens computed per step: larger reads prompts faster, smaller keeps answers smooth meanwhile."""
    idle_budget: int | None = None
    """Tokens of a step while no answer is being written; automatic: four times token_budget."""
    max_running: int = 32
    """Requests computed at the same time."""
    prefix_sharing: bool = True
    """Whether equal beginnings of prompts are computed once."""
    max_adapters: int = 8
    """Adapters in memory at the same time; requests for further ones wait until one is unused."""
    adapter_bytes: int = 1 << 30
    """Bytes of all adapters in memory."""
    quantize: str | None = None
    """Round a float model's matrices as they are loaded: w4a8, w8a8, w4a16, w8a16. Done anew at each start; `ernie quantize` loses less."""
    kv: Literal["whole", "int8", "int4"] = "whole"
    """Keys and values in the cache: in the compute type, or of 8 or 4 bits, which holds two to seven times as many tokens."""
    speculative: Literal["off", "ngram", "draft", "mtp"] = "off"
    """Guess tokens ahead and verify them in one step; answers stay the same. ngram: from prompt and answer; draft: by --engine.draft-model;
    mtp: by the model's own prediction block."""
    draft_model: str | None = None
    """A smaller model of the same vocabulary that guesses, for speculative draft."""
    draft_tokens: int = DRAFT_TOKENS
    """Tokens guessed ahead of an answer in one step, at most."""
    text_only: bool = False
    """Leave what a vision-language model sees with in its files: less memory, no pictures."""
    stuck_seconds: float = 300.0
    """An engine that does nothing for so long while requests run is ended and started again."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens, who may use it, and how it behaves. Keys come from a file or the environment, never from a flag."""

    host: str = "127.0.0.1"
    """Address to listen on; the default can be reached from this machine only."""
    port: int = 8000
    """Port to listen on; 0 takes a free one and prints it."""
    served_model_name: tuple[str, ...] = ()
    """Names that clients may use for the first model, besides its own."""
    adapters: Path | None = None
    """Folder whose subfolders are PEFT adapters; clients choose one as MODEL:ADAPTER."""
    media_hosts: tuple[str, ...] = ()
    """Hosts from which images and videos are fetched when a request names their address: HOST or HOST:PORT for https, http://HOST for
    plain http. Names must stand for public addresses; a private one is fetched from only when it is written here as numbers."""
    media_folder: Path | None = None
    """Folder whose images and videos requests may name as file:NAME; links out of it are not followed."""
    api_keys: Path | None = None
    """File with one key a line, `name:key` or `key`. With keys every route but /health/live and the pages' own files needs one."""
    open_metrics: bool = False
    """Let /metrics be read without a key."""
    requests_per_minute: int | None = None
    """Requests a key may send in a minute."""
    tokens_per_minute: int | None = None
    """Tokens, prompt and answer, a key may use in a minute."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that clients may use for this server; empty: this machine's own when it listens on loopback, else any."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call this server, exactly as browsers send them; credentials are never allowed."""
    reasoning_field: Literal["reasoning_content", "reasoning", "both"] = "both"
    """What an answer calls the model's thinking; both names are read."""
    keep_alive_seconds: float = 15.0
    """A stream that is silent for so long gets a comment."""
    drain_seconds: float = 30.0
    """On SIGTERM running requests may go on for so long."""
    idle_seconds: float | None = None
    """A model, other than the first, that nobody used for so long is unloaded."""
    storage: str = "auto"
    """Folder for uploaded files and batches, or off: then both are refused. auto is one for this port in the cache folder."""
    memory: str | None = None
    """Memory of all models together, such as 20GiB; automatic: nine tenths of what is available at the start."""
    log: Literal["json", "off"] = "json"
    """One line per request on standard error; prompts and answers are never in it."""
    tls_certificate: Path | None = None
    """Certificate chain (PEM); with --tls-key the server speaks HTTPS."""
    tls_key: Path | None = None
    """Private key (PEM) of the certificate."""
    otlp_endpoint: str | None = None
    """Address that OpenTelemetry traces are posted to, such as http://127.0.0.1:4318/v1/traces; prompts are never in them."""
    limits: Limits = field(default_factory=Limits)
    engine: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")
        _ = self.memory_bytes, self.media_origins
        if self.media_folder is not None and not self.media_folder.is_dir():
            raise ConfigError(f"media_folder is '{self.media_folder}', which is no folder")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("HTTPS needs both: tls_certificate and tls_key")
        for origin in self.cors_origins:
            if not origin.startswith(("http://", "https://")) or origin.rstrip("/") != origin:
                raise ConfigError(f"cors_origins holds '{origin}'; write origins exactly, such as https://chat.example.org")
        for name in ("requests_per_minute", "tokens_per_minute", "idle_seconds", "keep_alive_seconds", "drain_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, not {value!r}")

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes; None = automatic."""
        return None if self.memory is None else parse_bytes(self.memory, "memory")

    @property
    def media_origins(self) -> frozenset[Origin]:
        """`media_hosts`, read. Raises `ConfigError`."""
        return read_origins(self.media_hosts)

    @property
    def loopback(self) -> bool:
        """Whether it listens for this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def hosts(self) -> frozenset[str] | None:
        """Names a Host header may say, without port; None = any."""
        if self.allowed_hosts:
            return frozenset(name.lower() for name in self.allowed_hosts)
        return frozenset({"localhost", "127.0.0.1", "[::1]", self.host.lower()}) if self.loopback else None

"""Who may use the server, and how much: keys, and a rate for each key."""

import hashlib
import hmac
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ernie45.errors import ConfigError
from ernie45.server.failures import Failure

_SHORTEST = 8


@dataclass(frozen=True)
class Caller:
    """Who sent a request: the name that logs, rates and fair shares go by.

    salt        keeps its prompts' cache apart, when there are several
    owner       what it keeps here is kept under: the same after a restart, whatever the order of the keys is then
    background  a batch asks for it: it comes after whoever waits, and is not counted by the rates
    """

    name: str
    salt: str = ""
    owner: str = "anonymous"
    background: bool = False


ANONYMOUS = Caller("anonymous")
BEHIND = 1000
"""Added to the priority of background requests: more than any request may ask for."""


def host_name(host: str) -> str:
    """The name in a `Host` header, without its port, in small letters; an IPv6 address keeps its brackets."""
    return re.sub(r":\d+$", "", host).lower() if not host.endswith("]") else host.lower()


class Keys:
    """The keys that are let in, as digests; a key itself is not kept."""

    def __init__(self, keys: Iterable[tuple[str | None, str]]) -> None:
        """keys: (name, key), without a name if nobody gave one. Raises `ConfigError` for a short key, or a key or name that comes twice."""
        self._digests: list[tuple[bytes, Caller]] = []
        pairs = list(keys)
        for number, (given, key) in enumerate(pairs, 1):
            name = given or f"key{number}"
            if len(key) < _SHORTEST:
                raise ConfigError(
                    f"the API key '{name}' has {len(key)} characters; take at least {_SHORTEST}, such as from: openssl rand -hex 24"
                )
            digest = _digest(key)
            if any(known == digest or caller.name == name for known, caller in self._digests):
                raise ConfigError(f"the API key '{name}' is there twice")
            owner = f"name:{name}" if given else f"key:{_digest('owner:' + key).hex()}"
            self._digests.append((digest, Caller(name, salt=f"key:{name}" if len(pairs) > 1 else "", owner=owner)))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owning(self, owner: str) -> Caller | None:
        """Who keeps things under this name now; None when that key is not let in any more."""
        known = [caller for _, caller in self._digests] or [ANONYMOUS]
        return next((caller for caller in known if caller.owner == owner), None)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Whose key this is: `Authorization: Bearer KEY`, or `x-api-key: KEY`. Raises `Failure` 401. Every key is compared."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given)
        found: Caller | None = None
        for known, caller in self._digests:
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            what = "is not known" if given else "is missing: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            raise Failure(401, f"the API key {what}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found


def read_keys(path: Path | None, from_environment: Iterable[str]) -> Keys:
    """Keys of a file (`name:key` or `key`, one a line, # comments) and of the environment. Raises `ConfigError`."""
    lines = list(from_environment)
    if path is not None:
        try:
            lines += path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the key file {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
        if not any(line.strip() and not line.lstrip().startswith("#") for line in lines):
            raise ConfigError(f"the key file {path} holds no key; without keys the server would be open to all")
    pairs: list[tuple[str | None, str]] = []
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            name, colon, key = text.partition(":")
            pairs.append((name.strip(), key.strip()) if colon else (None, text))
    return Keys(pairs)


class Bucket:
    """So many a minute, and at most so many at once: what is used comes back evenly."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.size = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """What is left."""
        self._level = min(self.size, self._level + (now - self._at) * self.size / 60)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Uses some; it may go below nothing, and then nothing more is given until it is filled again."""
        self._level = self.level(now) - amount

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is there."""
        return max(0.0, (min(amount, self.size) - self.level(now)) * 60 / self.size)


class Rates:
    """A bucket of requests and one of tokens for each caller; None = no limit."""

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self._limits = {name: limit for name, limit in (("requests", requests), ("tokens", tokens)) if limit is not None}
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def admit(self, caller: Caller, now: float) -> None:
        """Counts a request. Raises `Failure` 429 when the caller has used up its requests or tokens."""
        if caller.background:
            return
        for name in self._limits:
            wait = self._bucket(caller, name, now).wait(1, now)
            if wait > 0:
                headers = {"Retry-After": str(math.ceil(wait)), **self.headers(caller, now)}
                text = f"this key may use {self._limits[name]:,} {name} a minute; try again in {math.ceil(wait)} s"
                raise Failure(429, text, code="rate_limit_exceeded", headers=headers)
        if "requests" in self._limits:
            self._bucket(caller, "requests", now).take(1, now)

    def use(self, caller: Caller, tokens: int, now: float) -> None:
        """Counts tokens that were read or written for a caller."""
        if "tokens" in self._limits and not caller.background:
            self._bucket(caller, "tokens", now).take(tokens, now)

    def headers(self, caller: Caller, now: float) -> dict[str, str]:
        """`x-ratelimit-*` as OpenAI sends them."""
        found = {}
        for name, limit in self._limits.items():
            bucket = self._bucket(caller, name, now)
            found[f"x-ratelimit-limit-{name}"] = str(limit)
            found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level(now))))
            found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait(limit, now):.0f}s"
        return found

    def _bucket(self, caller: Caller, name: str, now: float) -> Bucket:
        key = (caller.name, name)
        if key not in self._buckets:
            self._buckets[key] = Bucket(self._limits[name], now)
        return self._buckets[key]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()

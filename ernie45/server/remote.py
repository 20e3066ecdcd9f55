"""Addresses of other machines that requests name: read by one parser, which decides and from which is fetched, and held to a list."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from ernie45.errors import ConfigError, RequestError

_PORTS = {"https": 443, "http": 80}
_LONGEST = 2048  # characters of an address
_NAME = re.compile(r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_IN_PATHS = "%/:@!$&'()*+,;=?~"  # what a path and a query may hold as it is (RFC 3986)


@dataclass(frozen=True)
class Origin:
    """Whom an address asks, and how: scheme, host in lower case and without brackets, port."""

    scheme: str
    host: str
    port: int

    @property
    def literal(self) -> bool:
        """Whether the host is a network address and no name."""
        return _literal(self.host) is not None

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class Remote:
    """One thing elsewhere: whom to ask, and the path and query to ask for."""

    origin: Origin
    path: str

    @property
    def address(self) -> str:
        """The whole as an address."""
        return f"{self.origin.scheme}://{self.origin.authority}{self.path}"

    def follow(self, location: str) -> "Remote":
        """Where a redirect leads. Raises `RequestError`."""
        return read_address(urljoin(self.address, location))


def read_address(text: str) -> Remote:
    """An https: or http: address. Raises `RequestError` for what is none, or could be read in two ways."""
    if len(text) > _LONGEST:
        raise RequestError(f"the address has {len(text):,} characters; at most {_LONGEST:,}")
    if any(ord(letter) <= 0x20 or ord(letter) == 0x7F or letter in '\\<>"^`{|}' for letter in text):
        raise RequestError("the address holds spaces, control characters or others that stand in no address; write them percent-encoded")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise RequestError("the address cannot be read: its host or port is no such thing") from None
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    if scheme not in _PORTS:
        raise RequestError(f"the scheme {scheme[:20]!r} is not fetched; allowed: https")
    if "@" in parts.netloc:
        raise RequestError("the address carries a user name or password; such addresses are not fetched")
    if port == 0 or not (_NAME.fullmatch(host) or _literal(host) is not None):
        raise RequestError("the address names no host that can be asked; write it in ASCII letters (xn--... for others)")
    host = str(_literal(host) or host)
    path = quote(parts.path or "/", safe=_IN_PATHS) + (f"?{quote(parts.query, safe=_IN_PATHS)}" if parts.query else "")
    return Remote(Origin(scheme, host, port or _PORTS[scheme]), path)


def read_origins(entries: Iterable[str]) -> frozenset[Origin]:
    """A list of hosts, `HOST` or `HOST:PORT` for https and `http://HOST` for plain http. Raises `ConfigError` naming the entry."""
    found = set()
    for entry in entries:
        try:
            remote = read_address(entry if "://" in entry else f"https://{entry}")
        except RequestError as error:
            raise ConfigError(f"media_hosts holds '{entry[:200]}': {error}") from None
        if remote.path != "/" or entry.endswith("/") or "#" in entry:
            raise ConfigError(f"media_hosts holds '{entry[:200]}'; write hosts alone, such as images.example.org or http://10.0.0.5:8080")
        if _numeric(remote.origin.host) and not remote.origin.literal:
            raise ConfigError(f"media_hosts holds '{entry[:200]}'; write a network address as four numbers with dots")
        if remote.origin.literal and not _may_be_named(remote.origin.host):
            raise ConfigError(f"media_hosts holds '{entry[:200]}': link-local, multicast and unspecified addresses are never fetched from")
        found.add(remote.origin)
    return frozenset(found)


def is_public(address: str) -> bool:
    """Whether a network address belongs to the open internet: not this machine, not a private net, not a way into one."""
    found = _literal(address)
    if found is None or found.is_multicast or found.is_reserved or not found.is_global:
        return False
    if isinstance(found, ipaddress.IPv6Address):  # those that carry an IPv4 address lead wherever a gateway sends them
        return not (found.ipv4_mapped or found.sixtofour or found.teredo or found.is_site_local)
    return True


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    return None if isinstance(found, ipaddress.IPv6Address) and found.scope_id else found


def _numeric(host: str) -> bool:
    """Whether some programs would take it for an IPv4 address written in another way, such as 2130706433 or 0x7f.1."""
    return re.fullmatch(r"(0x[0-9a-f]*|[0-9]+)", host.rpartition(".")[2]) is not None


def _may_be_named(host: str) -> bool:
    found = _literal(host)
    assert found is not None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    plain = mapped or found
    return not (plain.is_link_local or plain.is_multicast or plain.is_unspecified or plain.is_reserved)

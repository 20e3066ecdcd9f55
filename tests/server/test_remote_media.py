"""Pictures that requests name by address: what may be fetched, from where, how much; and every way to reach what should not be reached."""

import asyncio
import base64
import contextlib
import socketserver
import ssl
import threading
import time

import httpx
import pytest
import trustme

from ernie45.errors import ConfigError, RequestError
from ernie45.server.failures import Failure
from ernie45.server.fetch import Fetcher
from ernie45.server.remote import is_public, read_address, read_origins
from ernie45.server.settings import ServerSettings
from tests.serving import serving
from tests.sighted import sighted_folder

PUBLIC = "93.184.215.14"
PNG = b"\x89PNG" + b"x" * 200


def answer(body=PNG, status="200 OK", kind="image/png", **headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def moved(location, status="302 Found"):
    return answer(b"", status, Location=location)


def drip(head, piece, times, pause=0.0):
    """An answer whose body comes piece by piece; whoever takes it may leave."""

    def send(link):
        with contextlib.suppress(OSError):
            link.sendall(head)
            for _ in range(times):
                link.sendall(piece)
                time.sleep(pause)

    return send


class Host:
    """A host of pictures on this machine: answers by path, raw, and remembers the heads of requests."""

    def __init__(self, tls=None):
        self.answers, self.heads = {}, []
        host = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError), tls.wrap_socket(self.request, server_side=True) if tls else self.request as link:
                    head = b""
                    while b"\r\n\r\n" not in head and (more := link.recv(4096)):
                        head += more
                    host.heads.append(head.decode())
                    made = host.answers.get(head.decode().split(" ")[1] if head else "", answer(b"", "404 Not Found"))
                    made(link) if callable(made) else link.sendall(made)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def hosts(authority):
    """(plain, TLS): the second has a certificate for images.test."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("images.test").configure_cert(tls)
    made = Host(), Host(tls)
    yield made
    for host in made:
        host.close()


class World:
    """A network with names of its own: every public address is the test's TLS host or plain host; who is dialled is remembered."""

    def __init__(self, hosts, authority):
        self.plain, self.secure = hosts
        for host in hosts:
            host.answers, host.heads = {}, []
        self.names = {"images.test": [PUBLIC]}
        self.looked, self.dialled = [], []
        self.tls = ssl.create_default_context()
        authority.configure_trust(self.tls)

    async def resolve(self, host, port):
        self.looked.append(host)
        found = self.names.get(host)
        if found is None:
            raise OSError("no such name")
        return found.pop(0) if found and isinstance(found[0], list) else found

    async def dial(self, address, port, **options):
        self.dialled.append((address, port, options.get("server_hostname")))
        return await asyncio.open_connection("127.0.0.1", self.secure.port if options else self.plain.port, **options)

    def fetch(self, *addresses, allowed=("images.test", "http://images.test"), seconds=5.0, most=10_000):
        async def run():
            fetcher = Fetcher(read_origins(allowed), seconds, tls=self.tls, resolve=self.resolve, dial=self.dial)
            return await fetcher.all({address: f"part {n}" for n, address in enumerate(addresses)}, most)

        return asyncio.run(run())

    def refused(self, *addresses, **options):
        with pytest.raises(Failure) as failure:
            self.fetch(*addresses, **options)
        assert failure.value.status == 400
        assert failure.value.field.startswith("part ")
        assert str(failure.value).startswith(failure.value.field)
        return str(failure.value)


@pytest.fixture
def world(hosts, authority):
    return World(hosts, authority)


# ---- what is allowed


def test_an_allowed_host_is_asked_plainly_and_over_a_checked_certificate(world):
    world.secure.answers["/a%20b/%E7%8C%AB.png?size=1&x=%2F"] = answer()
    address = "https://Images.Test/a%20b/猫.png?size=1&x=%2F#top"
    assert world.fetch(address) == {address: PNG}
    assert world.dialled == [(PUBLIC, 443, "images.test")]
    head = world.secure.heads[0].lower()
    assert "host: images.test\r\n" in head
    assert "accept-encoding: identity" in head
    assert not any(word in head for word in ("cookie", "authorization", "referer", "proxy"))


def test_several_are_fetched_at_once_and_share_the_bytes(world):
    world.plain.answers |= {f"/{n}": answer(bytes([n]) * 4000) for n in range(3)}
    found = world.fetch("http://images.test/0", "http://images.test/1")
    assert [len(data) for data in found.values()] == [4000, 4000]
    assert "are too large" in world.refused(*(f"http://images.test/{n}" for n in range(3)))


def test_the_environment_names_no_proxy(world, monkeypatch):
    for name in ("http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    world.plain.answers["/a"] = answer()
    assert world.fetch("http://images.test/a")


def test_a_body_in_chunks_and_one_that_ends_with_the_connection_are_read(world):
    world.plain.answers["/chunks"] = (
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    world.plain.answers["/until"] = b"HTTP/1.0 200 OK\r\nContent-Type: video/mp4\r\n\r\nabcde"
    assert set(world.fetch("http://images.test/chunks", "http://images.test/until").values()) == {b"abcde"}


# ---- addresses that are refused before anybody is asked


@pytest.mark.parametrize(
    "address",
    [
        "https://other.test/a.png",
        "https://images.test:8443/a.png",
        "https://images.test.evil.test/a.png",
        "https://images.test./a.png",
        "https://127.0.0.1/a.png",
        "https://2130706433/a.png",
        "https://0x7f.1/a.png",
        "https://[::1]/a.png",
        "https://[::ffff:127.0.0.1]/a.png",
        "https://169.254.169.254/latest/meta-data",
    ],
)
def test_hosts_that_are_not_on_the_list_are_not_asked(world, address):
    assert "is not among the hosts" in world.refused(address) or "names no host" in world.refused(address)
    assert not world.looked
    assert not world.dialled


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("https://user:secret@images.test/a.png", "user name or password"),
        ("https://images.test@evil.test/a.png", "user name or password"),
        ("https://evil.test\\@images.test/a.png", "control characters or others"),
        ("https://images.test\\.evil.test/", "control characters or others"),
        ("https://images.test/a\r\nHost: evil.test", "control characters or others"),
        ("https://images.test/a b", "spaces"),
        ("https://images.test\t.evil.test/", "control characters"),
        ("https://images.test%2eevil.test/", "names no host"),
        ("https://ımages.test/", "names no host"),
        ("https://images.test:0/", "names no host"),
        ("https://images.test:99999/", "host or port is no such thing"),
        ("https://[fe80::1%25eth0]/", "names no host|no such thing"),
        ("https://[::1/", "no such thing"),
        ("https:///a.png", "names no host"),
        ("https:images.test/a.png", "names no host"),
        ("ftp://images.test/a.png", "allowed: https"),
        ("gopher://images.test/", "allowed: https"),
        ("https://images.test/" + "a" * 3000, "at most 2,048"),
    ],
)
def test_addresses_that_could_be_read_in_two_ways_are_none(world, address, says):
    text = world.refused(address)
    assert any(word in text for word in says.split("|")), text
    assert not world.looked
    assert not world.dialled


def test_plain_http_is_fetched_only_where_it_is_said(world):
    world.plain.answers["/a"] = answer()
    assert "is not among the hosts" in world.refused("http://images.test/a", allowed=["images.test"])
    assert not world.dialled


# ---- names that lead inside


@pytest.mark.parametrize(
    "inside",
    [
        "127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "fec0::1", "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:93.184.215.14", "::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "64:ff9b::7f00:1", "not an address",
    ],
)  # fmt: skip
def test_a_name_for_an_address_inside_is_not_followed(world, inside):
    assert not is_public(inside)
    for found in ([inside], [PUBLIC, inside]):
        world.names["images.test"] = found
        assert "does not stand for an address of the open internet" in world.refused("https://images.test/a")
    assert not world.dialled


def test_public_addresses_are_public():
    assert all(map(is_public, ("93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c")))


def test_a_name_that_changes_its_mind_is_asked_once_and_the_answer_is_what_is_dialled(world):
    world.names["images.test"] = [[PUBLIC], ["127.0.0.1"]]
    world.plain.answers["/a"] = answer()
    assert world.fetch("http://images.test/a")
    assert world.looked == ["images.test"]
    assert [address for address, _, _ in world.dialled] == [PUBLIC]
    assert "open internet" in world.refused("http://images.test/a")  # the second answer
    assert len(world.dialled) == 1


def test_an_address_that_does_not_answer_is_followed_by_the_next(world):
    world.names["images.test"] = ["8.8.8.8", PUBLIC]
    world.plain.answers["/a"] = answer()
    dial = world.dial

    async def first_fails(address, port, **options):
        if address == "8.8.8.8":
            raise ConnectionRefusedError
        return await dial(address, port, **options)

    world.dial = first_fails
    assert world.fetch("http://images.test/a")
    assert world.dialled == [(PUBLIC, 80, None)]


def test_an_address_of_the_operators_own_is_asked_as_it_stands(world):
    world.plain.answers["/a"] = answer()
    assert world.fetch("http://10.0.0.5:9000/a", allowed=["http://10.0.0.5:9000"])
    assert world.dialled == [("10.0.0.5", 9000, None)]
    assert not world.looked


# ---- redirects


def test_redirects_are_followed_within_the_list(world):
    world.plain.answers["/a"] = moved("https://images.test/b")
    world.secure.answers |= {"/b": moved("c?d", "307 Temporary Redirect"), "/c?d": answer()}
    assert list(world.fetch("http://images.test/a").values()) == [PNG]
    assert [port for _, port, _ in world.dialled] == [80, 443, 443]


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("http://127.0.0.1/", "is not among the hosts"),
        ("http://169.254.169.254/latest/meta-data", "is not among the hosts"),
        ("https://evil.test/", "is not among the hosts"),
        ("//evil.test/", "is not among the hosts"),
        ("http://user@images.test/", "user name or password"),
        ("file:///etc/passwd", "allowed: https"),
        ("http://images.test\\@evil.test/", "control characters or others"),
        ("http://inside.test/", "open internet"),
        ("", "answered with status 302"),
    ],
)
def test_no_redirect_leads_out_of_the_list(world, location, says):
    world.names["inside.test"] = ["10.0.0.1"]
    world.plain.answers["/a"] = moved(location)
    allowed = ("http://images.test", "http://inside.test")
    assert says in world.refused("http://images.test/a", allowed=allowed)
    assert len(world.dialled) == 1


def test_the_list_holds_the_scheme_too_so_nothing_falls_back_to_plain_http(world):
    world.secure.answers["/a"] = moved("http://images.test/a")
    assert "http://images.test is not among the hosts" in world.refused("https://images.test/a", allowed=["images.test"])


def test_redirects_end(world):
    world.plain.answers["/a"] = moved("/a")
    assert "more than 3 times" in world.refused("http://images.test/a")
    assert len(world.dialled) == 4


# ---- hosts that misbehave


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (answer(b"x" * 10_001), "are too large"),
        (drip(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n", b"x" * 1000, 1000), "are too large"),
        (answer(kind="text/html"), "sends 'text/html', no image or video"),
        (answer(kind=""), "something without a type"),
        (answer(Content_Encoding="gzip"), "a packed body"),
        (answer(status="404 Not Found"), "answered with status 404"),
        (answer(status="206 Partial Content"), "answered with status 206"),
        (answer()[:-10], "broke off"),
        (b"", "broke off"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "broke off"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000, "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabc", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: image/png\r\n\r\nzz\r\n", "broke off"),
    ],
)
def test_what_is_no_picture_or_too_much_is_refused(world, raw, says):
    world.plain.answers["/a"] = raw
    assert says in world.refused("http://images.test/a")


@pytest.mark.parametrize(
    "slow",
    [
        drip(b"", b"", 1, 3.0),
        drip(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n", b"x", 60, 0.05),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 60, 0.05),
    ],
    ids=["says nothing", "a byte at a time", "goes on to go on"],
)
def test_a_slow_host_is_left(world, slow):
    world.plain.answers["/a"] = slow
    began = time.monotonic()
    assert "could not be fetched within 0.4 s" in world.refused("http://images.test/a", seconds=0.4)
    assert time.monotonic() - began < 2.5


def test_a_certificate_must_be_the_hosts_own_and_known(world, authority):
    world.names["other.test"] = [PUBLIC]
    world.secure.answers["/a"] = answer()
    assert "cannot be reached" in world.refused("https://other.test/a", allowed=["other.test"])
    world.tls = ssl.create_default_context()
    assert "cannot be reached" in world.refused("https://images.test/a")


def test_a_name_nobody_knows_cannot_be_reached(world):
    assert "cannot be reached" in world.refused("https://gone.test/a", allowed=["gone.test"])


# ---- the list


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.example.org", "example.org/path", "example.org/", "ftp://example.org", "http://", "user@example.org", "exa mple.org",
     "2130706433", "0x7f.1", "127.1", "169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "0.0.0.0", "224.0.0.1", "example.org:x"],
)  # fmt: skip
def test_a_wrong_entry_of_the_list_is_named_at_the_start(entry):
    with pytest.raises(ConfigError, match="media_hosts holds"):
        ServerSettings(media_hosts=(entry,))


def test_hosts_are_known_by_scheme_name_and_port():
    origins = read_origins(["images.example.org", "HTTPS://Big.example.org:8443", "http://10.0.0.5", "[2001:DB8::0:1]:99"])
    assert {(o.scheme, o.host, o.port) for o in origins} == {
        ("https", "images.example.org", 443),
        ("https", "big.example.org", 8443),
        ("http", "10.0.0.5", 80),
        ("https", "2001:db8::1", 99),
    }
    assert read_address("https://[2001:db8:0::1]:99/x").origin in origins
    with pytest.raises(RequestError):
        read_address("x")


def test_the_folder_must_be_one(tmp_path):
    with pytest.raises(ConfigError, match=r"media_folder is .*no folder"):
        ServerSettings(media_folder=tmp_path / "missing")


# ---- over HTTP


@pytest.fixture(scope="module")
def served(tmp_path_factory, hosts, photo):
    """A server of a model that sees: fetches from the plain host, reads a folder that holds cat.png."""
    home = tmp_path_factory.mktemp("media")
    folder = sighted_folder(home / "model")
    (home / "pictures").mkdir()
    (home / "pictures" / "cat.png").write_bytes(photo("chelsea.png"))
    arguments = ["--media-hosts", f"http://127.0.0.1:{hosts[0].port}", "--media-folder", str(home / "pictures"), "--limits.images", "2"]
    with serving(str(folder), "--engine.num-pages", "256", *arguments) as server:
        yield server.url, f"http://127.0.0.1:{hosts[0].port}"


def ask(url, *addresses):
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}], "max_tokens": 2}, timeout=60)


def test_every_protocol_sees_the_same_picture_wherever_it_lies(served, hosts, photo):
    url, elsewhere = served
    hosts[0].answers = {"/cat.png": answer(photo("chelsea.png")), "/moved": moved("/cat.png")}
    inline = "data:image/png;base64," + base64.b64encode(photo("chelsea.png")).decode()
    counts = set()
    for address in (inline, f"{elsewhere}/cat.png", f"{elsewhere}/moved", "file:cat.png"):
        done = ask(url, address)
        assert done.status_code == 200, done.text
        counts.add(done.json()["usage"]["prompt_tokens_details"]["image_tokens"])
    assert len(counts) == 1
    source = {"type": "url", "url": f"{elsewhere}/cat.png"}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    said = httpx.post(f"{url}/v1/messages", json={"messages": messages, "max_tokens": 2}, timeout=60)
    assert said.status_code == 200, said.text
    counted = httpx.post(f"{url}/v1/messages/count_tokens", json={"messages": messages}, timeout=60)
    assert counted.json()["input_tokens"] > counts.pop()
    item = {"role": "user", "content": [{"type": "input_image", "image_url": f"{elsewhere}/cat.png"}]}
    response = httpx.post(f"{url}/v1/responses", json={"input": [item], "max_output_tokens": 2}, timeout=60)
    assert response.status_code == 200, response.text


def test_what_cannot_be_fetched_is_a_400_that_names_the_part(served, hosts):
    url, elsewhere = served
    hosts[0].answers = {"/junk": answer(b"junk"), "/out": moved("http://127.0.0.1:1/")}
    for address, says in (
        (f"{elsewhere}/missing", "answered with status 404"),
        (f"{elsewhere}/junk", "no image of a known format"),
        (f"{elsewhere}/out", "is not among the hosts"),
        ("https://example.com/cat.png", "is not among the hosts"),
        ("http://169.254.169.254/", "is not among the hosts"),
        ("file:../model/config.json", "only files in the folder"),
        ("file:missing.png", "cannot be read"),
    ):
        refused = ask(url, address)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert says in error["message"]
        assert error["param"] == "messages[0].content[0]"


def test_pictures_are_counted_before_they_are_fetched(served, hosts):
    url, elsewhere = served
    hosts[0].heads.clear()
    refused = ask(url, *(f"{elsewhere}/{n}" for n in range(3)))
    assert refused.status_code == 400
    assert "more than 2 images" in refused.json()["error"]["message"]
    assert not hosts[0].heads

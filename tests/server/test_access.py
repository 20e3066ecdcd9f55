"""Keys, hosts, origins, rates: who comes in, and that every route is behind the door."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import ConfigError
from ernie45.server.access import ANONYMOUS, Bucket, Keys, Rates, read_keys
from ernie45.server.app import routes_of
from ernie45.server.door import OPEN
from ernie45.server.failures import Failure
from ernie45.server.line import Line

KEY = "a-long-enough-key"


@pytest.fixture
def locked(serve):
    return serve(keys=(KEY,))


def test_every_route_needs_the_key_but_liveness_and_the_page(locked):
    app = locked.server.config.app
    seen = 0
    for route in routes_of(app):
        for method in getattr(route, "methods", ()):
            if method not in ("HEAD", "OPTIONS"):
                path = route.path.replace("{name:path}", "x").replace("{id}", "x").replace("{name}", "x")
                status = locked.client().request(method, path).status_code
                assert (status == 401) == (path not in OPEN | {"/", "/status", "/web/x"}), f"{method} {path}: {status}"
                seen += 1
    assert seen > 8
    assert locked.client().get("/no/such/route").status_code == 401


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}])
def test_the_right_key_opens(locked, headers):
    assert locked.client().get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"])
def test_a_wrong_key_does_not(locked, given):
    response = locked.client().get("/v1/models", headers={"authorization": given})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_keys_are_never_in_the_log(locked, until):
    locked.client().get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
    locked.client().get(f"/v1/models?key={KEY}")
    until(lambda: len(locked.lines) == 2)
    assert KEY not in "".join(locked.lines)


def test_metrics_can_be_opened(serve):
    assert serve(keys=(KEY,), open_metrics=True).client().get("/metrics").status_code == 200


def test_comparing_looks_at_every_key(monkeypatch):
    import hmac

    compared = []
    true = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(1) or true(a, b))
    keys = Keys([(str(n), f"key-number-{n}") for n in range(5)])
    assert keys.caller({"x-api-key": "key-number-0"}).name == "0"
    assert len(compared) == 5


def test_a_key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\nada: {KEY}\n\n{KEY}2\n")
    keys = read_keys(path, [])
    assert keys.caller({"x-api-key": KEY}).name == "ada"
    assert keys.caller({"x-api-key": KEY}).salt == "key:ada"
    assert keys.caller({"x-api-key": KEY + "2"}).name == "key2"


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", f"{KEY}\n{KEY}\n", f"a:{KEY}\na:{KEY}2\n"])
def test_a_wrong_key_file_is_refused(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_keys(path, [])


def test_a_missing_key_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys(tmp_path / "none", [])


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "169.254.169.254"])
def test_a_foreign_host_name_is_refused(running, host):
    response = running.client().get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:5"])
def test_this_machines_names_pass(running, host):
    assert running.client().get("/v1/models", headers={"host": host}).status_code == 200


def test_pages_of_other_origins_are_refused_and_get_no_cors(running):
    for origin in ("http://evil.example", "null", "http://localhost.evil.example"):
        response = running.client().post("/v1/chat/completions", json={}, headers={"origin": origin})
        assert response.status_code == 403
        assert not [name for name in response.headers if name.startswith("access-control")]
    own = running.client().get("/v1/models", headers={"origin": running.url})
    assert own.status_code == 200


def test_allowed_origins_get_cors_without_credentials(serve):
    running = serve(cors_origins=("https://chat.example.org",))
    headers = {"origin": "https://chat.example.org", "access-control-request-method": "POST"}
    before = running.client().options("/v1/chat/completions", headers=headers)
    assert before.status_code == 204
    assert before.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "authorization" in before.headers["access-control-allow-headers"]
    after = running.client().get("/v1/models", headers={"origin": "https://chat.example.org"})
    assert after.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "access-control-allow-credentials" not in after.headers


@pytest.mark.parametrize("origin", ["*", "chat.example.org", "https://chat.example.org/"])
def test_an_origin_must_be_exact(serve, origin):
    with pytest.raises(ConfigError):
        serve(cors_origins=(origin,))


def test_requests_a_minute(serve):
    running = serve(requests_per_minute=2)
    first, _, third = running.chat("«x»"), running.chat("«x»"), running.chat("«x»")
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert third.status_code == 429
    assert 1 <= int(third.headers["retry-after"]) <= 31
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert running.client().get("/health").status_code == 200


def test_tokens_a_minute_by_key(serve):
    running = serve(keys=("a:key-of-ada-1", "b:key-of-bob-1"), tokens_per_minute=40)

    def ask(key):
        return running.client(headers={"x-api-key": key}).post("/v1/completions", json={"prompt": "x" * 30, "max_tokens": 20})

    assert [ask(key).status_code for key in ("key-of-ada-1", "key-of-ada-1", "key-of-bob-1")] == [200, 429, 200]


def test_several_keys_do_not_share_prompts_in_the_cache(serve, until):
    running = serve(keys=("a:key-of-ada-1", "b:key-of-bob-1"))
    for key in ("key-of-ada-1", "key-of-bob-1", "key-of-ada-1"):
        running.client(headers={"x-api-key": key}).post("/v1/completions", json={"prompt": "y" * 64, "max_tokens": 1})
    until(lambda: len(running.log()) == 3)
    cached = [line["cached_tokens"] for line in running.log()]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 5)), max_size=40))
def test_a_bucket_never_gives_more_than_its_rate(uses):
    bucket, now, given = Bucket(60, 0.0), 0.0, 0.0
    for wait, amount in uses:
        now += wait
        if bucket.wait(amount, now) == 0:
            bucket.take(amount, now)
            given += amount
    assert given <= 60 + now + 1e-6


def test_rates_without_limits_say_nothing():
    rates = Rates(None, None)
    rates.admit(ANONYMOUS, 0.0)
    assert rates.headers(ANONYMOUS, 0.0) == {}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(1, 9)), max_size=60))
def test_a_line_loses_nobody_and_keeps_each_callers_order(items):
    line = Line(100)
    for number, (caller, priority, size) in enumerate(items):
        line.add((caller, priority, number), caller, priority, size)
    out = []
    while (item := line.take()) is not None:
        out.append(item)
    assert sorted(out, key=lambda item: item[2]) == [(c, p, n) for n, (c, p, _) in enumerate(items)]
    assert [item[1] for item in out] == sorted(item[1] for item in out)
    for caller in "abc":
        for priority in range(3):
            mine = [n for c, p, n in out if (c, p) == (caller, priority)]
            assert mine == sorted(mine)
    assert len(line) == 0


@given(st.integers(2, 5), st.integers(1, 30))
def test_callers_with_equal_requests_take_turns(callers, each):
    line = Line(1000)
    for caller in range(callers):
        for _ in range(each):
            line.add(caller, str(caller), 0, 1.0)
    out = [line.take() for _ in range(callers * each)]
    for start in range(0, len(out), callers):
        assert len(set(out[start : start + callers])) == callers


def test_removed_items_are_gone():
    line = Line(3)
    first, second = object(), object()
    line.add(first, "a", 0, 1)
    line.add(second, "a", 0, 1)
    assert line.remove(first)
    assert not line.remove(first)
    assert line.take() is second
    assert line.room(3)
    assert not line.room(4)


def test_the_callers_of_a_failure_learn_nothing_of_the_inside(running, until):
    async def broken(*_, **__):
        raise RuntimeError("/secret/path 0xdeadbeef the prompt was X")

    running.service.context = broken
    response = running.chat("x")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "0x" not in response.text
    until(lambda: running.log("error"))
    [line] = running.log("error")
    assert line["error"] == "RuntimeError"
    assert line["id"] in response.text
    assert "secret" not in "".join(running.lines)


def test_answers_carry_an_id_and_safe_headers(running):
    mine = running.client().get("/v1/models", headers={"x-request-id": "my-id_1"})
    odd = running.client().get("/v1/models", headers={"x-request-id": "bad id\twith spaces"})
    assert mine.headers["x-request-id"] == "my-id_1"
    assert odd.headers["x-request-id"].startswith("req_")
    assert mine.headers["x-content-type-options"] == "nosniff"
    assert "server" not in mine.headers


def test_failure_words():
    assert Failure(418, "x").kind == "server_error"
    assert Failure(429, "x").openai()["error"]["type"] == "rate_limit_error"

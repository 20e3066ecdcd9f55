"""Files and batches as OpenAI's client sees them: whole lives of batches, what is refused, who sees what, who goes first."""

import json
import socket
import threading

import openai
import pytest

from ernie45.engine.scheduler import SchedulerConfig
from ernie45.server.access import Keys

SMALL = SchedulerConfig(token_budget=64, max_running=2, page_size=8, num_pages=128, max_length=512)


def line(n, url="/v1/chat/completions", **body):
    if not body:
        body = {"messages": [{"role": "user", "content": f"«answer {n}»"}]}
    return {"custom_id": f"line-{n}", "method": "POST", "url": url, "body": body}


def jsonl(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


@pytest.fixture
def client():
    """Makes OpenAI's client for a server."""
    made = []

    def make(running, key="none"):
        made.append(openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def batch(client, until):
    """Runs a batch to its end and gives it with its client."""

    def run(running, rows, endpoint="/v1/chat/completions", key="none", **options):
        api = client(running, key)
        file = api.files.create(file=("in.jsonl", jsonl(rows)), purpose="batch")
        made = api.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)
        until(lambda: api.batches.retrieve(made.id).status in ("completed", "failed", "expired", "cancelled"))
        return api, api.batches.retrieve(made.id)

    return run


def rows_of(api, id):
    return [json.loads(text) for text in api.files.content(id).text.splitlines()] if id else []


def test_a_batch_lives_as_openai_says(running, batch):
    api, done = batch(running, [line(n) for n in range(20)], metadata={"for": "test"})
    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (20, 20, 0)
    assert done.metadata == {"for": "test"}
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert done.expires_at == done.created_at + 24 * 3600
    assert done.error_file_id is None
    output = rows_of(api, done.output_file_id)
    assert [row["custom_id"] for row in output] == [f"line-{n}" for n in range(20)], "in the order of the input"
    assert [row["response"]["body"]["choices"][0]["message"]["content"] for row in output] == [f"answer {n}" for n in range(20)]
    assert {row["response"]["status_code"] for row in output} == {200}
    assert all(row["error"] is None for row in output)
    used = [row["response"]["body"]["usage"] for row in output]
    assert done.model == "fake"
    assert done.usage.input_tokens == sum(each["prompt_tokens"] for each in used) > 0
    assert done.usage.output_tokens == sum(each["completion_tokens"] for each in used) > 0
    assert done.usage.input_tokens_details.cached_tokens == sum(each["prompt_tokens_details"]["cached_tokens"] for each in used)
    assert done.usage.output_tokens_details.reasoning_tokens == 0
    assert done.usage.total_tokens == sum(each["total_tokens"] for each in used)
    kept = api.files.retrieve(done.output_file_id)
    assert (kept.purpose, kept.filename) == ("batch_output", f"{done.id}_output.jsonl")
    assert kept.bytes == len(api.files.content(kept.id).content)


ENDPOINTS = {
    "/v1/completions": ({"prompt": "«yes»"}, lambda body: body["choices"][0]["text"] == "yes"),
    "/v1/embeddings": ({"input": "hello"}, lambda body: len(body["data"][0]["embedding"]) == 16),
    "/v1/responses": ({"input": "«yes»"}, lambda body: body["output"][0]["content"][0]["text"] == "yes"),
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint(running, batch, endpoint):
    body, good = ENDPOINTS[endpoint]
    api, done = batch(running, [line(0, endpoint, **body)], endpoint)
    [row] = rows_of(api, done.output_file_id)
    assert good(row["response"]["body"])
    assert done.usage.total_tokens == row["response"]["body"]["usage"]["total_tokens"] > 0
    if endpoint == "/v1/responses":
        with pytest.raises(openai.NotFoundError):
            api.responses.retrieve(row["response"]["body"]["id"])


def test_a_wrong_request_is_in_the_error_file_and_the_rest_goes_on(running, batch):
    rows = [line(0), line(1, messages=[], model="fake"), line(2), line(3, messages=[{"role": "user", "content": "x"}], model="none")]
    api, done = batch(running, rows)
    assert done.status == "completed"
    assert (done.request_counts.completed, done.request_counts.failed) == (2, 2)
    assert [row["custom_id"] for row in rows_of(api, done.output_file_id)] == ["line-0", "line-2"]
    first, second = rows_of(api, done.error_file_id)
    assert (first["custom_id"], first["response"]["status_code"]) == ("line-1", 400)
    assert first["response"]["body"]["error"]["param"] == "messages"
    assert second["response"]["body"]["error"]["code"] == "model_not_found"


FAULTS = {
    "not json": ("{", "body is not JSON", None),
    "a list": ("[1]", "must be a JSON object", None),
    "a constant": ('{"custom_id": NaN}', "must be finite", None),
    "no id": (json.dumps({"method": "POST"}), "custom_id must be", "custom_id"),
    "a long id": (json.dumps(line(1) | {"custom_id": "x" * 513}), "1 to 512", "custom_id"),
    "another method": (json.dumps(line(1) | {"method": "GET"}), "must be POST", "method"),
    "another url": (json.dumps(line(1) | {"url": "/v1/embeddings"}), "url must be /v1/chat", "url"),
    "no body": (json.dumps(line(1) | {"body": "x"}), "an object", "body"),
    "a stream": (json.dumps(line(1, stream=True)), "leave stream out", "body.stream"),
    "a field too many": (json.dumps(line(1) | {"model": "x"}), "'model' is not a field", "model"),
    "twice": (json.dumps(line(0)), "line 1 has the same custom_id", "custom_id"),
    "half a character": ('{"custom_id": "\\ud800"}', "surrogate", None),
    "not utf-8": (b"\xff\xfe".decode("latin-1"), "not JSON", None),
    "deep": ("[" * 80 + "]" * 80, "nested", None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_line_fails_the_batch_and_is_named(running, batch, name):
    text, message, param = FAULTS[name]
    _, done = batch(running, [line(0), "", text, line(2)])
    assert done.status == "failed"
    [error] = done.errors.data
    assert (error.line, error.param) == (3, param)
    assert message in error.message
    assert done.output_file_id is None
    assert running.engine.submitted == []


def test_limits_of_the_input(serve, batch):
    running = serve(limits={"batch_lines": 2, "body_bytes": 300})
    _, done = batch(running, [line(n) for n in range(3)])
    assert done.errors.data[0].code == "too_many_requests"
    _, done = batch(running, [line(0), line(1, messages=[{"role": "user", "content": "x" * 300}])])
    assert [(error.line, error.code) for error in done.errors.data] == [(2, "line_too_long")]
    _, done = batch(running, ["", "  "])
    assert done.errors.data[0].code == "empty_file"


def test_what_a_batch_may_ask_for(running, client):
    api = client(running)
    file = api.files.create(file=("in.jsonl", jsonl([line(0)])), purpose="batch")
    good = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    wrong = [
        ("endpoint", "/v1/models"),
        ("completion_window", "30m"),
        ("completion_window", "169h"),
        ("input_file_id", "file-none"),
        ("input_file_id", "../../etc/passwd"),
        ("metadata", {"k": "v" * 513}),
        ("metadata", {"k" * 65: "v"}),
        ("output_expires_after", {"anchor": "created_at", "seconds": 1}),
        ("callback", "http://x"),
    ]
    for field, value in wrong:
        response = running.post("/v1/batches", good | {field: value})
        assert response.status_code == 400, field
        assert response.json()["error"]["param"].startswith(field)
    for path in ("/v1/batches/none", "/v1/files/none", "/v1/files/none/content", "/v1/files/..%2Flock", "/v1/batches?after=batch_none"):
        assert running.client().get(path).status_code == 404
    for path in ("/v1/batches?limit=0", "/v1/batches?limit=x", "/v1/batches?page=2", "/v1/files?order=up", "/v1/files?limit=10001"):
        assert running.client().get(path).status_code == 400


def test_cancelling_keeps_what_is_done(serve, client, until):
    running = serve(engine_limits=SMALL)
    api = client(running)
    file = api.files.create(
        file=("in.jsonl", jsonl([line(n, messages=[{"role": "user", "content": "x"}]) for n in range(300)])), purpose="batch"
    )
    made = api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    until(lambda: api.batches.retrieve(made.id).request_counts.completed > 3)
    running.engine.held.set()  # however slow this test is, there is something left to cancel
    assert running.client().delete(f"/v1/files/{file.id}").json()["error"]["code"] == "file_in_use"
    assert api.batches.cancel(made.id).status == "cancelling"
    running.engine.held.clear()
    until(lambda: api.batches.retrieve(made.id).status == "cancelled")
    done = api.batches.retrieve(made.id)
    output, errors = rows_of(api, done.output_file_id), rows_of(api, done.error_file_id)
    assert len(output) + len(errors) == 300
    assert {row["custom_id"] for row in output + errors} == {f"line-{n}" for n in range(300)}
    assert {row["error"]["code"] for row in errors} == {"batch_cancelled"}
    assert done.cancelled_at >= done.cancelling_at
    until(lambda: running.engine.fake.idle)
    with pytest.raises(openai.ConflictError):
        api.batches.cancel(made.id)
    assert api.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        api.files.retrieve(file.id)


def test_a_batch_whose_time_is_over_expires(serve, client, until):
    running = serve()
    storage = storage_of(running)
    api = client(running)
    running.engine.held.set()
    file = api.files.create(file=("in.jsonl", jsonl([line(0)])), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    with storage.database.change() as link:  # as if it had been made a day ago, save half a second
        link.execute("CREATE TRIGGER soon AFTER INSERT ON batches BEGIN UPDATE batches SET expires = created + 1; END")
    made = api.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    until(lambda: api.batches.retrieve(made.id).status == "expired")
    done = api.batches.retrieve(made.id)
    [row] = rows_of(api, done.error_file_id)
    assert (row["response"], row["error"]["code"]) == (None, "batch_expired")
    kept = api.files.retrieve(done.error_file_id)
    assert kept.expires_at == kept.created_at + 7200
    until(lambda: running.engine.fake.idle)


def storage_of(running):
    """The server's storage, for looking behind the routes."""
    runner = running.server.config.app.inner.state.runner
    return runner._storage


def test_expired_files_are_gone(running, client, until):
    api = client(running)
    storage = storage_of(running)
    file = api.files.create(file=("in.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    clock = storage.clock
    storage.files._clock = lambda: clock() + 3601
    with pytest.raises(openai.NotFoundError):
        api.files.retrieve(file.id)
    assert list(api.files.list()) == []
    running.loop.call_soon_threadsafe(running.server.config.app.inner.state.runner.wake)
    until(lambda: not (storage.database.files / file.id).exists())


def test_lists_come_in_pages(running, client):
    api = client(running)
    files = [api.files.create(file=(f"{n}.jsonl", jsonl([line(0)])), purpose="batch") for n in range(7)]
    assert [file.id for file in api.files.list(limit=3)] == [file.id for file in reversed(files)], "the client turns the pages"
    assert [file.id for file in api.files.list(limit=3, order="asc")] == [file.id for file in files]
    page = running.client().get("/v1/files?limit=3").json()
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, files[6].id, files[4].id)
    assert len(page["data"]) == 3
    assert list(api.files.list(purpose="batch_output")) == []
    made = [api.batches.create(input_file_id=f.id, endpoint="/v1/chat/completions", completion_window="1h") for f in files[:5]]
    assert [batch.id for batch in api.batches.list(limit=2)] == [batch.id for batch in reversed(made)]


def test_a_key_never_sees_what_another_key_keeps(serve, batch, client):
    running = serve(keys=("a:key-of-ada-1", "b:key-of-bob-1"))
    api, done = batch(running, [line(0)], key="key-of-ada-1")
    other = client(running, "key-of-bob-1")
    for ask in (
        lambda: other.files.retrieve(done.input_file_id),
        lambda: other.files.content(done.output_file_id),
        lambda: other.files.delete(done.input_file_id),
        lambda: other.batches.retrieve(done.id),
        lambda: other.batches.cancel(done.id),
        lambda: list(other.batches.list(after=done.id)),
        lambda: list(other.files.list(after=done.input_file_id)),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    with pytest.raises(openai.BadRequestError, match="there is no file"):
        other.batches.create(input_file_id=done.input_file_id, endpoint="/v1/chat/completions", completion_window="24h")
    assert list(other.files.list()) == []
    assert list(other.batches.list()) == []
    assert len(list(api.files.list())) == 2
    assert running.engine.submitted[0].cache_salt == "key:a", "and its prompts stay apart in the cache"


def test_what_is_kept_follows_the_key_and_not_its_place_in_the_file():
    first, second = "first-key-1234", "second-key-123"
    one, other = Keys([(None, first), (None, second)]), Keys([(None, second), (None, first)])

    def owner(keys, key):
        return keys.caller({"x-api-key": key}).owner

    assert owner(one, first) == owner(other, first) != owner(one, second)
    assert owner(Keys([("ada", first)]), first) == owner(Keys([("ada", second)]), second), "a named key can be changed"
    assert one.owning(owner(one, first)).name == "key1"
    assert Keys([(None, second)]).owning(owner(one, first)) is None
    assert Keys([]).owning("anonymous").name == "anonymous"


def test_batches_go_behind_those_who_wait_and_leave_places_free(serve, client, until):
    running = serve(engine_limits=SMALL)  # the server's setting of 32 places is not the engine's: its two are both taken
    api = client(running)
    running.engine.held.set()
    file = api.files.create(file=("in.jsonl", jsonl([line(n) for n in range(6)])), purpose="batch")
    made = api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    until(lambda: running.service.models[0].running == 2 and running.service.models[0].waiting == 4)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(running.chat("«person»", priority=100)))
    thread.start()
    until(lambda: running.service.models[0].waiting == 5)
    running.engine.held.clear()
    thread.join()
    assert answers[0].json()["choices"][0]["message"]["content"] == "person"
    until(lambda: api.batches.retrieve(made.id).status == "completed")
    order = [request.priority for request in running.engine.submitted]
    assert order[2] == 100
    assert order.count(1000) == 6


def test_rates_are_for_requests_that_somebody_waits_for(serve, batch):
    running = serve(requests_per_minute=1000, tokens_per_minute=1)
    _, done = batch(running, [line(n) for n in range(5)])
    assert done.request_counts.completed == 5
    assert running.client().get("/v1/models").headers["x-ratelimit-remaining-tokens"] == "1"


def test_a_line_on_which_the_model_breaks_is_tried_again_and_then_told(serve, batch):
    broken = []

    def fails(request):
        if b"bad" in bytes(id - 3 for id in request.prompt if 3 <= id < 259):
            broken.append(request.id)
            return True
        return False

    running = serve(fails=fails)
    api, done = batch(running, [line(0), line(1, messages=[{"role": "user", "content": "bad"}]), line(2)])
    assert (done.request_counts.completed, done.request_counts.failed) == (2, 1)
    assert len(broken) == 3
    [row] = rows_of(api, done.error_file_id)
    assert row["response"]["body"]["error"]["code"] == "engine_error"


def test_an_engine_that_dies_costs_no_line(serve, client, until):
    running = serve(engine_limits=SMALL)
    api = client(running)
    file = api.files.create(file=("in.jsonl", jsonl([line(n) for n in range(8)])), purpose="batch")
    dead = running.engine
    dead.held.set()
    made = api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    until(lambda: running.service.models[0].running == 2)
    running.loop.call_soon_threadsafe(dead.dies, "the engine process ended with code -9")
    until(lambda: api.batches.retrieve(made.id).status == "completed")
    assert len(rows_of(api, api.batches.retrieve(made.id).output_file_id)) == 8
    for request in dead.submitted:
        dead.fake.cancel(request.id)


def test_files_and_batches_can_be_switched_off(serve):
    running = serve(storage="off")
    for path in ("/v1/files", "/v1/files/x", "/v1/files/x/content", "/v1/batches", "/v1/batches/x"):
        response = running.client().get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "storage_off")
    assert running.client().post("/v1/files", files={"file": ("x", b"{}")}, data={"purpose": "batch"}).status_code == 404
    assert running.chat("«x»").status_code == 200


# ---- uploads


def upload(running, data=b"{}", name="x.jsonl", **fields):
    return running.client().post("/v1/files", files={"file": (name, data)}, data={"purpose": "batch"} | fields)


def test_names_of_files_are_cleaned(running):
    assert upload(running, name="../../etc/pass wd").json()["filename"] == "pass wd"
    assert upload(running, name="c:\\dir\\файл.jsonl").json()["filename"] == "файл.jsonl"
    assert upload(running, name="new\nline").json()["filename"].isprintable()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"surprise": "1"}, "surprise"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}, "expires_after.seconds"),
        ({"expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"purpose": "x" * 2000}, "purpose"),
    ],
)
def test_a_wrong_form_is_a_400_and_leaves_nothing(running, fields, param):
    response = upload(running, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert list(storage_of(running).database.files.iterdir()) == []


def test_forms_that_are_no_forms(running):
    client = running.client()
    boundary = {"content-type": "multipart/form-data; boundary=B"}
    start = b'--B\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
    bad = [
        (b"", boundary, 400),
        (b"garbage", boundary, 400),
        (start + b"half", boundary, 400),
        (b'--B\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--B--\r\n', boundary, 400),
        (b'--B\r\ncontent-disposition: form-data; name="file"\r\n\r\nno name\r\n--B--\r\n', boundary, 400),
        (start + b"a\r\n" + start + b"b\r\n--B--\r\n", boundary, 400),
        (b"--B\r\n" + b"x-h: 1\r\n" * 100 + b"\r\n", boundary, 400),
        (b"--B\r\nx: " + b"y" * 10_000, boundary, 400),
        (b"{}", {"content-type": "application/json"}, 415),
        (b"--B--", {"content-type": "multipart/form-data"}, 415),
        (b"x", {"content-type": "multipart/form-data; boundary=" + "B" * 400}, 400),
    ]
    for body, headers, status in bad:
        response = client.post("/v1/files", content=body, headers=headers)
        assert response.status_code == status, (body[:80], response.text)
    assert list(storage_of(running).database.files.iterdir()) == []


def test_a_file_that_is_too_large_is_a_413_whether_it_says_so_or_not(serve):
    running = serve(limits={"file_bytes": 100_000})
    assert upload(running, b"x" * 100_000).status_code == 200
    assert upload(running, b"x" * 100_001).status_code == 413

    def pieces():
        yield b'--B\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(200):
            yield b"x" * 1000

    response = running.client().post("/v1/files", content=pieces(), headers={"content-type": "multipart/form-data; boundary=B"})
    assert response.status_code == 413
    assert len(list(storage_of(running).database.files.iterdir())) == 1


def test_a_key_may_keep_so_much(serve, client):
    running = serve(limits={"files": 2, "storage_bytes": 1000, "unfinished_batches": 1})
    assert upload(running, b"x" * 1001).json()["error"]["code"] == "storage_quota"
    first = upload(running, jsonl([line(0)])).json()["id"]
    assert upload(running).status_code == 200
    assert upload(running).json()["error"]["code"] == "storage_quota"
    running.engine.held.set()
    body = {"input_file_id": first, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert running.post("/v1/batches", body).status_code == 200
    refused = running.post("/v1/batches", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_batches")


def test_an_upload_that_stops_is_a_408_and_one_that_is_given_up_leaves_nothing(serve, until):
    running = serve(limits={"read_seconds": 0.3})
    host, port = running.url.removeprefix("http://").split(":")
    head = b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=B\r\ncontent-length: 5000\r\n\r\n"
    start = b'--B\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nhalf'
    with socket.create_connection((host, int(port))) as link:
        link.sendall(head + start)
        assert b" 408 " in link.recv(1000)
    with socket.create_connection((host, int(port))) as link:
        link.sendall(head + start)
    until(lambda: len(running.log()) == 2)
    until(lambda: list(storage_of(running).database.files.iterdir()) == [])

"""The disk under batches: a killed server loses and doubles nothing; full disks and damaged databases are answered."""

import errno
import json
import os
import signal
import sqlite3
import time

import openai
import pytest

from ernie45.errors import ConfigError
from ernie45.server.batches.database import guarded
from ernie45.server.batches.input import Line
from ernie45.server.batches.storage import Storage, open_storage
from ernie45.server.failures import Failure
from tests.serving import start

ROWS = 200


def jsonl(count):
    body = {"messages": [{"role": "user", "content": "«" + "words " * 12 + "»"}]}
    rows = [{"custom_id": f"line-{n}", "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Server:
    """`ernie serve fake` as a process of its own over a folder."""

    def __init__(self, folder):
        made = start("fake", "--storage", str(folder), "--engine.max-running", "4", start_new_session=True)
        self.process = made.process
        self.api = openai.OpenAI(base_url=made.url + "/v1", api_key="none", max_retries=0)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stderr.close()
        self.api.close()


def test_a_server_that_is_killed_in_the_middle_loses_and_doubles_no_line(tmp_path):
    server = Server(tmp_path)
    file = server.api.files.create(file=("in.jsonl", jsonl(ROWS)), purpose="batch")
    batch = server.api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    counts = []
    for part in (1, 2):
        while (found := server.api.batches.retrieve(batch.id)).request_counts.completed < part * ROWS // 4:
            time.sleep(0.01)
        counts.append(found.request_counts.completed)
        server.kill()
        server = Server(tmp_path)
        counts.append(server.api.batches.retrieve(batch.id).request_counts.completed)
    assert counts == sorted(counts), "what was done stays done"
    assert counts[0] < ROWS > counts[2], "it was killed in the middle"
    while (done := server.api.batches.retrieve(batch.id)).status != "completed":
        assert done.status in ("in_progress", "finalizing")
        time.sleep(0.01)
    rows = [json.loads(line) for line in server.api.files.content(done.output_file_id).text.splitlines()]
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(ROWS)]
    assert (done.request_counts.completed, done.request_counts.failed) == (ROWS, 0)
    assert len(os.listdir(tmp_path / "files")) == 2
    server.kill()


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def parts(monkeypatch):
    """Every part that is opened; closed at the end, as the system does for a process that was killed."""
    from ernie45.server.batches.files import Part

    made = []
    begin = Part.__init__

    def noted(self, database):
        begin(self, database)
        made.append(self)

    monkeypatch.setattr(Part, "__init__", noted)
    yield made
    for part in made:
        part._out.close()


@pytest.fixture
def storage(tmp_path):
    made = Storage(tmp_path)
    yield made
    made.close()


def ready_batch(storage, count=4):
    """A batch with `count` lines, of which the first has a result and the second has failed."""
    part = storage_part(storage, jsonl(count))
    file = storage.files.keep(part, "me", "in.jsonl", "batch", None)
    batch = storage.batches.create("me", file, "/v1/chat/completions", 24, metadata={}, kept=None, most=9)
    storage.batches.begin(batch.id, [Line(number=n, custom_id=f"line-{n}", place=n, size=1) for n in range(count)])
    storage.batches.settle(batch.id, 0, True, '{"custom_id": "line-0"}')
    storage.batches.settle(batch.id, 1, False, '{"custom_id": "line-1"}')
    return batch


def storage_part(storage, data):
    from ernie45.server.batches.files import Part

    part = Part(storage.database)
    part.write(data)
    return part


def test_a_result_is_kept_once(storage):
    batch = ready_batch(storage)
    storage.batches.settle(batch.id, 0, False, '{"custom_id": "again"}')
    found = storage.batches.get(batch.id)
    assert (found.completed, found.failed) == (1, 1)
    assert [line.number for line in storage.batches.todo(batch.id)] == [2, 3]


@pytest.mark.parametrize("step", range(1, 9))
def test_a_kill_at_any_step_of_the_end_leaves_a_batch_that_ends_well(tmp_path, monkeypatch, parts, step):
    """Every system call of the end that changes the disk is the last one once."""
    storage = Storage(tmp_path)
    batch = ready_batch(storage)
    count = 0

    def counted(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                raise Killed  # once: later calls are the next server's
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    from ernie45.server.batches import jobs
    from ernie45.server.batches.files import Part

    counted(os, "fsync")
    counted(Part, "write")
    counted(Part, "settle")
    counted(jobs, "insert_file")
    with pytest.raises(Killed):
        storage.batches.finish(batch.id, "completed")
    storage.close()  # the lock of a process that is gone is free, its open transaction is undone
    again = Storage(tmp_path)
    [alive] = again.batches.alive()
    assert alive.status == "finalizing"
    again.batches.finish(batch.id, "completed")
    done = again.batches.get(batch.id)
    with again.files.open(again.files.find(done.output_file, "me")) as file:
        assert file.read() == b'{"custom_id": "line-0"}\n'
    with again.files.open(again.files.find(done.error_file, "me")) as file:
        ids = [json.loads(line)["custom_id"] for line in file]
    assert ids == ["line-1", "line-2", "line-3"]
    again.close()
    last = Storage(tmp_path)
    assert len(os.listdir(tmp_path / "files")) == 3
    last.close()


def test_a_full_disk_is_a_507_and_what_was_begun_is_undone(storage, monkeypatch):
    batch = ready_batch(storage)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failure) as caught:
        storage.batches.finish(batch.id, "completed")
    assert (caught.value.status, caught.value.code) == (507, "storage_full")
    part = storage_part(storage, b"x")
    with pytest.raises(Failure):
        storage.files.keep(part, "me", "x", "batch", None)
    monkeypatch.undo()
    assert len(os.listdir(storage.database.files)) == 1, "the input alone"
    storage.batches.finish(batch.id, "completed")
    assert storage.batches.get(batch.id).status == "completed"


def test_a_full_database_is_a_507_and_goes_on_when_there_is_room(storage):
    batch = ready_batch(storage)
    [[pages]] = [row.values() for row in storage.database.rows("PRAGMA page_count")]
    storage.database.rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Failure) as caught:
        storage.batches.settle(batch.id, 2, True, "x" * 1_000_000)
    assert caught.value.code == "storage_full"
    assert [line.number for line in storage.batches.todo(batch.id)] == [2, 3]
    storage.database.rows("PRAGMA max_page_count = 100000")
    storage.batches.settle(batch.id, 2, True, "x" * 1_000_000)
    assert [line.number for line in storage.batches.todo(batch.id)] == [3]


def damaged(folder):
    """A folder whose database holds a page of noise."""
    storage = Storage(folder)
    ready_batch(storage, 200)
    storage.close()
    path = folder / "jobs.sqlite"
    data = bytearray(path.read_bytes())
    data[4096 * 2 :] = os.urandom(len(data) - 4096 * 2)
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [damaged, lambda folder: (folder / "jobs.sqlite").write_bytes(b"no database at all" * 300)])
def test_a_damaged_database_is_refused_at_the_start_and_nothing_is_deleted(tmp_path, harm):
    harm(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="--storage"):
        open_storage(str(tmp_path), tmp_path, 8000)
    assert sorted(path.name for path in tmp_path.rglob("*") if not path.name.endswith(("-wal", "-shm"))) == sorted(
        {*before, "files", "lock"}
    )


def test_with_trouble_in_the_automatic_folder_the_server_serves_all_else(tmp_path, serve, monkeypatch):
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "8000").write_text("a file where a folder should be")
    failure = open_storage("auto", tmp_path, 8000)
    assert (failure.status, failure.code) == (503, "storage_unavailable")
    monkeypatch.setattr("ernie45.server.build.open_storage", lambda *_: failure)
    running = serve()
    response = running.client().get("/v1/batches")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "storage_unavailable")
    assert str(tmp_path) not in response.text
    assert running.chat("«x»").status_code == 200


def test_a_database_that_breaks_while_the_server_runs_is_a_503(serve):
    running = serve()
    runner = running.server.config.app.inner.state.runner
    link = runner._storage.database._link

    async def break_it():
        await runner._storage.run(link.execute, "DROP TABLE batches")

    running.do(break_it())
    response = running.client().get("/v1/batches")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "storage_unavailable")
    assert "batches" not in response.json()["error"]["message"].replace("files and batches", "")


def test_a_folder_is_for_one_server_at_a_time(tmp_path):
    first = Storage(tmp_path)
    with pytest.raises(Failure, match="another server"):
        Storage(tmp_path)
    first.close()
    Storage(tmp_path).close()


def test_a_newer_database_is_refused(tmp_path):
    Storage(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as link:
        link.execute("PRAGMA user_version = 99")
    link.close()
    with pytest.raises(Failure, match="newer version"):
        Storage(tmp_path)


def test_a_database_of_the_first_version_is_brought_up(tmp_path):
    storage = Storage(tmp_path)
    batch = ready_batch(storage)
    storage.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as link:
        link.executescript("ALTER TABLE batches DROP COLUMN model; ALTER TABLE batches DROP COLUMN usage; PRAGMA user_version = 1;")
    link.close()
    for _ in range(2):
        storage = Storage(tmp_path)
        assert storage.batches.find(batch.id, "me").body()["usage"] is None
        storage.close()
    storage = Storage(tmp_path)
    answer = {"model": "m", "usage": {"input_tokens": 5, "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 1}}}
    for _ in range(2):  # what has a result keeps it, and is counted once
        storage.batches.settle(batch.id, 2, True, "{}", answer)
    body = storage.batches.get(batch.id).body()
    assert (body["model"], body["usage"]["total_tokens"]) == ("m", 7)
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 1}
    storage.close()


def test_only_its_owner_can_read_the_folder(tmp_path):
    storage = Storage(tmp_path / "deep" / "folder")
    batch = ready_batch(storage)
    assert (tmp_path / "deep" / "folder").stat().st_mode & 0o77 == 0
    assert (tmp_path / "deep" / "folder" / "jobs.sqlite").stat().st_mode & 0o77 == 0
    assert (storage.database.files / batch.input_file).stat().st_mode & 0o77 == 0
    storage.close()


def test_what_a_killed_server_left_half_written_is_removed(tmp_path, parts):
    storage = Storage(tmp_path)
    storage_part(storage, b"half")
    orphan = storage_part(storage, b"whole, without a row")
    orphan.settle()
    storage.close()
    Storage(tmp_path).close()
    assert os.listdir(tmp_path / "files") == []


def test_other_errors_of_the_system_are_a_503():
    with pytest.raises(Failure) as caught, guarded():
        raise PermissionError(errno.EACCES, "Permission denied", "/secret/path")
    assert caught.value.status == 503
    assert "secret" not in str(caught.value)

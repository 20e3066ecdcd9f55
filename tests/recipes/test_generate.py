"""`ernie generate` over a tiny model: rows of every kind, wrong rows by line and field, and a run that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tokenizers
import torch

from ernie45.cli import dispatch
from ernie45.errors import ConfigError, DataError, RunError
from ernie45.models.config import TextConfig
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.recipes.generate import Meter
from ernie45.recipes.results import Results

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny folder that chats, bytes for words."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = TextConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=8,
        ffn_size=32,
        vocab_size=384,
        max_positions=256,
        rope_theta=1e4,
    )
    save_model(Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.3), folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={char: n for n, char in enumerate(special + alphabet)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return folder


@pytest.fixture
def files(tmp_path):
    """Writes rows; gives the paths of input and output."""

    def write(rows):
        path = tmp_path / "in.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
        return path, tmp_path / "out.jsonl"

    return write


def words(model, source, out, *more):
    return ["generate", str(model), "--input", str(source), "--output", str(out), "--max-tokens", "6", "--seed", "1", *map(str, more)]


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


KINDS = [
    {"prompt": "Hello"},
    {"id": 7, "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True},
    "",
    {"id": "talk", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0},
    {
        "custom_id": "line",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "x",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_completion_tokens": 2,
            "stream": False,
            "temperature": 0,
        },
    },
    {"custom_id": "plain", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello", "stop": ["zzz"]}},
]


def test_rows_of_every_kind_are_answered_in_order(model, files, capsys):
    source, out = files(KINDS)
    assert dispatch(words(model, source, out, "--max-running", 2)) == 0
    rows = read(out)
    assert [(row["line"], row["id"]) for row in rows] == [(1, None), (2, 7), (4, "talk"), (5, "line"), (6, "plain")]
    assert rows[1]["usage"]["completion_tokens"] == 3
    assert rows[3]["usage"]["completion_tokens"] <= 2
    assert rows[0]["text"] == rows[4]["text"], "the same prompt and seed, beside others"
    assert not out.with_name("out.jsonl.part").exists()
    assert "5 answers, 0 rows skipped" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is there already"):
        dispatch(words(model, source, out))


WRONG = {
    "not json": ("{", ":2: it is not JSON"),
    "no object": ("[1]", ":2: it must be a JSON object"),
    "nothing asked": ({"id": 1}, ":2, prompt: a row has either prompt or messages"),
    "both": ({"prompt": "x", "messages": [{}]}, ":2, prompt: a row has either"),
    "unknown": ({"prompt": "x", "max_token": 3}, ":2, max_token: .* did you mean 'max_tokens'"),
    "a value": ({"prompt": "x", "temperature": -1}, ":2, temperature: temperature must be"),
    "empty": ({"prompt": ""}, ":2, prompt: prompt must be"),
    "no messages": ({"messages": []}, ":2, messages: messages must be"),
    "tools alone": ({"prompt": "x", "tools": [{}]}, ":2, tools: tools need messages"),
    "an id twice": ({"prompt": "x", "id": "first"}, ":2, id: line 1 has the same id"),
    "an odd id": ({"prompt": "x", "id": [1]}, ":2, id: id must be"),
    "another url": ({"custom_id": "1", "url": "/v1/embeddings", "body": {"input": "x"}}, ":2, url: url must be"),
    "a batch's field": ({"custom_id": "1", "url": "/v1/completions", "body": {"prompt": "x", "echo": True}}, ":2, echo: 'echo' is not"),
    "too long": ({"prompt": "x" * 300}, ":2, prompt: the prompt has 300 tokens"),
    "no role": ({"messages": [{"content": "x"}]}, ":2, messages: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_named_or_passed_over(model, files, name, capsys):
    row, words_of_it = WRONG[name]
    source, out = files([{"id": "first", "prompt": "x"}, row, {"id": "last", "prompt": "y"}])
    with pytest.raises(DataError, match=words_of_it):
        dispatch(words(model, source, out))
    assert not out.exists()
    out.with_name("out.jsonl.part").unlink(missing_ok=True)
    assert dispatch(words(model, source, out, "--skip-bad")) == 1
    first, wrong, last = read(out)
    assert (first["id"], last["id"]) == ("first", "last")
    assert wrong["line"] == 2
    assert wrong["error"]["message"]


def test_files_that_are_none(model, files, tmp_path):
    source, out = files([])
    with pytest.raises(DataError, match="holds no rows"):
        dispatch(words(model, source, out))
    with pytest.raises(DataError, match="cannot be read"):
        dispatch(words(model, tmp_path / "none.jsonl", out))
    source, _ = files([{"prompt": "x"}])
    with pytest.raises(RunError, match="cannot be written"):
        dispatch(words(model, source, tmp_path / "no" / "out.jsonl"))


def test_a_run_that_is_killed_goes_on_and_gives_the_same_answers(model, files):
    source, out = files([{"prompt": f"row {n}", "ignore_eos": True, "max_tokens": 40} for n in range(60)])
    whole = out.with_name("whole.jsonl")
    dispatch(words(model, source, whole, "--max-running", 2))
    part = out.with_name("out.jsonl.part")
    program = "import sys; from ernie45.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *words(model, source, out, "--max-running", 2)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ)) as process:
        while not part.exists() or part.read_bytes().count(b"\n") < 10:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    before = part.read_bytes()
    assert 10 <= before.count(b"\n") < 60, "it was killed in the middle"
    part.write_bytes(before + b'{"line": 59, "te')  # half a line, as a full disk leaves it
    assert dispatch(words(model, source, out, "--max-running", 2)) == 0
    assert [{**row, "usage": None} for row in read(out)] == [{**row, "usage": None} for row in read(whole)]


def test_a_part_of_something_else_is_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    with Results(out, {"input": "1", "model": "a"}) as results:
        results.add({"line": 3})
        with pytest.raises(RunError, match="in use"):
            Results(out, {"input": "1", "model": "a"})
    with pytest.raises(ConfigError, match="begun with another model"):
        Results(out, {"input": "1", "model": "b"})
    with Results(out, {"input": "1", "model": "a"}) as again:
        assert again.done == {3}
    out.with_name("out.jsonl.part").write_text("noise\n")
    with pytest.raises(ConfigError, match="holds no results"):
        Results(out, {"input": "1", "model": "a"})


def test_the_meter_draws_on_a_terminal_and_tells_a_log_now_and_then():
    class Terminal:
        text = ""

        def __init__(self, terminal):
            self.isatty = lambda: terminal

        def write(self, text):
            self.text += text

        def flush(self):
            return None

    log, terminal = Terminal(False), Terminal(True)
    for stream in (log, terminal):
        meter = Meter(4, stream)
        for done in range(5):
            meter.show(done)
        meter.tokens = 10
        meter.end(4)
    assert log.text.count("\n") == 2
    assert "4 of 4 rows" in log.text.splitlines()[-1]
    assert "tokens/s" in log.text
    assert "█" * 24 in terminal.text

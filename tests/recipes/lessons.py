"""What the tests of training commands share: a tiny model that chats, rows to learn from, and how a command is run."""

import json

import pytest
import tokenizers
import torch

from ernie45.models.released import tiny
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.recipes import lesson
from tests.sighted import sighted_folder
from tests.tokens.conftest import CHATML

ROWS = [
    {"src": ["What is up?"], "tgt": ["The sky is up."]},
    {"messages": [{"role": "user", "content": "And down?"}, {"role": "assistant", "content": "The sea."}]},
    {"instruction": "Name a colour", "input": "", "output": "Green, like grass."},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there."}]},
]
PAIRS = [
    {"src": ["What is up?"], "tgt": [], "response": [["The sky."], ["No idea, go away."]], "sort": [1, 0]},
    {"prompt": "And down?", "chosen": "The sea.", "rejected": "Never mind that."},
]


@pytest.fixture(scope="module")
def one_thread():
    """Several test runs share two cores; a team of threads that waits for a busy core is slower than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "experts"])
def model(request, tmp_path_factory):
    """A tiny model folder that chats."""
    return chatting_folder(tmp_path_factory.mktemp("model") / "base", experts=request.param)


def chatting_folder(folder, experts=False, vocabulary=384):
    """Writes a tiny model folder that chats: ChatML over a byte-level vocabulary."""
    config = tiny(experts=experts, vocab_size=vocabulary)
    save_model(Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.1), folder)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["some words"], trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return folder


@pytest.fixture(scope="module")
def seer(tmp_path_factory):
    """A tiny random model folder that sees and chats."""
    return sighted_folder(tmp_path_factory.mktemp("seer") / "base")


@pytest.fixture(scope="module")
def put_photos(photo):
    """Writes the named photographs into a folder."""

    def put(folder, names):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_bytes(photo(name))

    return put


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return path


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), "utf-8")
    return path


def ernie(*words):
    """Run a command as `main` would, mistakes as exceptions."""
    from ernie45.cli import dispatch

    return dispatch([str(word) for word in words])


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


COMMON = ("--batch-tokens", 128, "--schedule.peak", "1e-2", "--epochs", 8)


class Stop(Exception):
    """Ends a run in the middle."""


def stop_at(step, monkeypatch):
    """Lets the next lessons end with `Stop` when they report this step, while the patch holds."""

    class Stopper(lesson.Watcher):
        def __call__(self, report):
            if report.step == step:
                raise Stop

    monkeypatch.setattr(lesson, "Watcher", Stopper)

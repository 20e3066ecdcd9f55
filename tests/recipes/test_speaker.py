"""A real engine behind the chat: a tiny random model with a vocabulary of bytes, from its folder to the pipe."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ernie45 import ops
from ernie45.cli import main
from ernie45.errors import CheckpointError, ConfigError, RequestError
from ernie45.models.released import tiny
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.recipes.answer import headline
from ernie45.recipes.conversation import Turn
from ernie45.recipes.speaker import model_name, open_speaker, read_generation_config

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
ASK = [Turn(role="user", content="Hi")]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A team of threads that waits for a busy core is slower than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model: no chat template."""
    folder = tmp_path_factory.mktemp("made") / "tiny-base"
    save_model(Decoder(tiny(vocab_size=261)).initialise(torch.Generator().manual_seed(0)), folder)
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    return folder


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """The same with a chat template."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("made") / "tiny")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}))
    return folder


@pytest.fixture
def speak(environment):
    def make(folder, thinking=None, chat=True, dtype="auto", **sampling):
        return open_speaker(str(folder), environment, dtype=dtype, thinking=thinking, sampling=lambda advice: sampling, chat=chat)

    return make


def answer(reply):
    return "".join(piece.text for piece in reply)


def test_an_answer_comes_in_pieces_with_its_numbers(folder, speak):
    speaker = speak(folder, max_tokens=20, seed=3)
    reply = speaker.reply(ASK)
    text = answer(reply)
    outcome = reply.outcome
    assert text
    assert outcome.prompt_tokens == speaker.count(ASK)
    assert 0 < outcome.answer_tokens <= 20
    assert outcome.finish_reason in ("length", "stop")
    assert 0 < outcome.first_token_s <= outcome.total_s
    assert speaker.limit == 4096
    settings = speaker.settings()
    assert settings["compute"].startswith("float32 (")
    assert settings["kernels"] == ops.describe()
    assert ops.describe() in headline(speaker)
    assert settings["sampling"] == "temperature 1.0, seed 3"


def test_a_seed_repeats_the_answer_and_retry_does_not(folder, speak):
    first, again = speak(folder, max_tokens=20, seed=3), speak(folder, max_tokens=20, seed=3)
    text = answer(first.reply(ASK))
    assert answer(again.reply(ASK)) == text
    assert answer(again.reply(ASK, retry=1)) != text


def test_a_stopped_answer_frees_the_engine(folder, speak):
    speaker = speak(folder, max_tokens=30, temperature=0.0)
    reply = speaker.reply(ASK)
    for n, _ in enumerate(reply):
        if n == 2:
            break
    reply.close()
    assert reply.outcome.finish_reason == "cancelled"
    assert reply.outcome.answer_tokens < 10
    assert answer(speaker.reply(ASK))


def test_a_base_model_continues_and_does_not_chat(base, speak):
    with pytest.raises(CheckpointError, match=r"base cannot chat: .*--prompt"):
        speak(base)
    speaker = speak(base, chat=False, max_tokens=5, temperature=0.0)
    assert speaker.count(ASK) == 2
    assert answer(speaker.reply(ASK))
    with pytest.raises(RequestError, match="leave the system message out"):
        speaker.reply([Turn(role="system", content="x"), *ASK])


def test_thinking_is_refused_where_there_is_none(folder, base, speak):
    with pytest.raises(RequestError, match="no thinking"):
        speak(folder, thinking=True)
    with pytest.raises(ConfigError, match="no thinking"):
        speak(base, thinking=True, chat=False)


def test_the_name_is_honest(folder, tmp_path):
    assert model_name(folder) == "tiny"
    (tmp_path / "config.json").write_text('{"ernie45_source": "Other in ERNIE form; no ERNIE weights"}')
    assert model_name(tmp_path) == "Other in ERNIE form"
    assert model_name(tmp_path / "some-Q4_0.gguf") == "some-Q4_0"


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_damaged_generation_config_is_not_passed_over(tmp_path, content):
    assert read_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)


def test_the_whole_way_through_a_pipe(folder):
    command = [sys.executable, "-m", "ernie45", "chat", str(folder), "--json", "--temperature", "0", "--max-tokens", "6"]
    done = subprocess.run(command, input="héllo".encode(), capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["model"] == "tiny"
    assert data["answer_tokens"] <= 6
    assert data["settings"]["sampling"] == "greedy"
    assert data["prompt_tokens"] > len("héllo".encode())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "3"], "top_p"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-tokens", "5000"], "4,096"),
        (["--system", "x" * 9000], "4,096"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(folder, capsys, arguments, says):
    assert main(["chat", str(folder), "--prompt", "hi", *arguments]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert out == ""

"""Pictures from the command line and from Python, with a tiny random model that sees: counted, or refused."""

import json
import re

import pytest

from ernie45.cli import main
from ernie45.config import Environment
from ernie45.engine.client import LLM
from ernie45.engine.request import SamplingParams
from ernie45.errors import RequestError
from ernie45.models.load import load_model
from ernie45.recipes.session import Session
from ernie45.recipes.speaker import open_speaker
from ernie45.tokens.images import read_image
from ernie45.tokens.video import FrameChoice, read_video
from tests.hostile_files import images_for, videos
from tests.sighted import RULES, sighted_folder

GREEDY = SamplingParams(temperature=0, max_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sighted_folder(tmp_path_factory.mktemp("seeing") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, num_pages=256)


@pytest.fixture(scope="module")
def files(tmp_path_factory, photo, clip):
    home = tmp_path_factory.mktemp("files")
    (home / "cat.png").write_bytes(photo("chelsea.png"))
    (home / "coins.png").write_bytes(photo("coins.png"))
    (home / "clip.mp4").write_bytes(clip("carphone_pristine.mp4"))
    return home


def shown(*paths, text="What is this?"):
    return [{"role": "user", "content": [*({"type": "image", "image": str(path)} for path in paths), {"type": "text", "text": text}]}]


def test_a_chat_with_pictures_counts_and_depends_on_them(llm, files):
    cat, coins = (llm.chat(shown(files / name), GREEDY) for name in ("cat.png", "coins.png"))
    tokens = read_image((files / "cat.png").read_bytes(), RULES).tokens
    assert cat.image_tokens == tokens
    assert cat.video_tokens == 0
    assert cat.prompt_tokens > tokens
    assert cat.token_ids != coins.token_ids
    again = llm.chat(shown(files / "cat.png"), GREEDY)
    assert again.token_ids == cat.token_ids
    assert again.cached_tokens > tokens


def test_a_video_is_seen(llm, files):
    parts = [{"type": "video_url", "video_url": {"url": str(files / "clip.mp4"), "num_frames": 4}}, {"type": "text", "text": "And?"}]
    done = llm.chat([{"role": "user", "content": parts}], GREEDY)
    assert done.video_tokens == read_video((files / "clip.mp4").read_bytes(), RULES, FrameChoice(count=4)).picture.tokens
    assert len(done.token_ids) == 5


def test_generate_takes_pictures_where_the_text_says(llm, files):
    picture = read_image((files / "cat.png").read_bytes(), RULES)
    prompt = llm.render(shown(files / "cat.png"))
    (chatted,) = llm.generate([prompt.ids], GREEDY, pictures=[[picture]])
    assert chatted.token_ids == llm.chat(shown(files / "cat.png"), GREEDY).token_ids
    seen, blind = llm.generate(["Look: <|image@placeholder|> so", "Look:  so"], GREEDY, pictures=[[picture], []])
    assert seen.image_tokens == picture.tokens
    assert blind.image_tokens == 0
    with pytest.raises(RequestError, match="the text has places for image, and given are image, image"):
        llm.generate(["<|image@placeholder|>"], GREEDY, pictures=[[picture, picture]])
    with pytest.raises(RequestError, match="there are 1 prompts, and pictures for 2"):
        llm.generate(["x"], GREEDY, pictures=[[], []])


def test_the_command_shows_a_picture(folder, files, capsys):
    ask = ["chat", str(folder), "--prompt", "What?", "--json", "--temperature", "0", "--max-tokens", "4"]
    assert main([*ask, "--image", str(files / "cat.png"), "--image", str(files / "coins.png"), "--video", str(files / "clip.mp4")]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert main(ask) == 0
    assert seen["prompt_tokens"] > json.loads(capsys.readouterr().out)["prompt_tokens"] + 200


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--image", "missing.png"], "missing.png cannot be read"),
        (["--image", __file__], "no image of a known format"),
        (["--video", __file__], "no video of a known container"),
        (["--image", "x.png", "--text-only"], "--text-only loads a model without its eyes"),
    ],
)
def test_mistakes_with_pictures_are_told(folder, flags, says, capsys):
    assert main(["chat", str(folder), "--prompt", "What?", *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["image", "video"])
def test_hostile_files_are_seen_or_refused(folder, tmp_path, kind, capsys):
    """A refusal is one line that names the file, and comes before the model is asked."""
    films = {name: found for name, found in videos().items() if name in ("one frame", "no frames", "cut off before its table")}
    for name, (data, refusal) in (images_for(RULES) if kind == "image" else films).items():
        (tmp_path / "stranger").write_bytes(data)
        ended = main(["chat", str(folder), "--prompt", "What?", "--json", "--max-tokens", "1", f"--{kind}", str(tmp_path / "stranger")])
        said = capsys.readouterr()
        if refusal is None:
            assert ended == 0, (name, said.err)
            assert json.loads(said.out)["prompt_tokens"] > 10
        else:
            assert ended == 2, name
            assert re.search(f"stranger.*({refusal})", said.err), (name, said.err)


def test_text_only_leaves_the_eyes_in_the_file(folder, files):
    blind = LLM(folder, num_pages=64, text_only=True)
    assert blind.sight is None
    assert len(blind.chat("Hello", GREEDY).token_ids) == 5
    with pytest.raises(RequestError, match="sees no images or videos"):
        blind.chat(shown(files / "cat.png"), GREEDY)


def test_text_only_says_how_much_it_left(folder, capsys):
    whole, text = (sum(tensor.nbytes for tensor in load_model(folder, text_only=only).state_dict().values()) for only in (False, True))
    left = f"{(whole - text) / 2**20:,.1f} MiB as stored"
    assert left in LLM(folder, num_pages=64, text_only=True).settings()["unseen"]
    assert "unseen" not in LLM(folder, num_pages=64).settings()
    assert main(["chat", str(folder), "--prompt", "Hello", "--max-tokens", "1", "--text-only"]) == 0
    assert left in capsys.readouterr().err


def test_pictures_go_with_the_next_message(folder, files, capsys):
    def sampling(_):
        return {"temperature": 0, "max_tokens": 3}

    speaker = open_speaker(str(folder), Environment.read(), dtype="auto", thinking=None, sampling=sampling, chat=True)
    session = Session(speaker, Environment.read())
    session.take(f"/image {files / 'cat.png'}")
    session.take(f"/image {files / 'missing.png'}")
    session.take("/video")
    session.take("What is this?")
    session.take("And now?")
    said = capsys.readouterr().out
    assert "goes with your next message; its pictures take" in said
    assert "missing.png cannot be read" in said
    assert "/video needs the name of a file" in said
    assert [turn.images for turn in session.turns if turn.role == "user"] == [(str(files / "cat.png"),), ()]

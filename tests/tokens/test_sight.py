"""Conversations with pictures: where they may come from, how they are measured, and the ids that come of them."""

import base64
import io
import os
from pathlib import Path

import pytest
from PIL import Image as Pillow

from ernie45.errors import RequestError, TokenizerError
from ernie45.tokens.images import ImageLimits
from ernie45.tokens.messages import Image, Message, Text, Video
from ernie45.tokens.pictures import PixelRules
from ernie45.tokens.sight import PictureReader, Sources
from ernie45.tokens.template import MediaSpan, family_template
from ernie45.tokens.video import FrameChoice

RULES = PixelRules(frame_min=56 * 56, frame_max=112 * 112)


def png(width=70, height=98, colour=(200, 10, 10)) -> bytes:
    file = io.BytesIO()
    Pillow.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def address(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


@pytest.mark.parametrize(
    "part",
    [
        image(address(png())),
        {"type": "image_url", "image_url": address(png())},
        {"type": "image", "image": address(png())},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png()).decode()}},
        {"type": "image", "source": {"type": "url", "url": address(png())}},
    ],
)
def test_every_way_to_write_an_image_is_measured(part):
    (message,), (picture,) = PictureReader(rules=RULES).look(user(part, {"type": "text", "text": "What is this?"}))
    assert picture.tokens == 8  # 70 x 98: 2.5 and 3.5 of 28 round to 2 and 4
    assert [type(part) for part in message.parts] == [Image, Text]
    assert message.parts[0].tokens == 8


def test_a_conversation_becomes_ids_with_a_place_for_every_token(tagged, clip):
    template = family_template("ernie-vl", tagged)
    sight = PictureReader(rules=RULES, choice=FrameChoice(count=4))
    messages, pictures = sight.look(
        [
            {"role": "user", "content": [image(address(png())), {"type": "text", "text": "and"}, image(address(png(28, 28)))]},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": [{"type": "video_url", "video_url": {"url": address(clip("bikes.mp4"), "video/mp4")}}]},
        ]
    )
    prompt = template.render(messages)
    assert [(span.kind, span.index, span.length) for span in prompt.media] == [
        ("image", 0, pictures[0].tokens),
        ("image", 1, pictures[1].tokens),
        ("video", 0, pictures[2].tokens),
    ]
    placeholder, between = tagged.id_of("<|IMAGE_PLACEHOLDER|>"), tagged.id_of
    for span, word in zip(prompt.media, ("IMAGE", "IMAGE", "VIDEO"), strict=True):
        assert set(prompt.ids[span.start : span.start + span.length]) == {placeholder}
        assert prompt.ids[span.start - 1] == between(f"<|{word}_START|>")
        assert prompt.ids[span.start + span.length] == between(f"<|{word}_END|>")
    assert prompt.ids.count(placeholder) == sum(picture.tokens for picture in pictures)
    assert "Picture 1:" in prompt.text
    assert "and" in prompt.text
    assert "Picture 2:" in prompt.text
    assert "Video 1:" in prompt.text
    assert prompt.media[0] == MediaSpan("image", 0, prompt.media[0].start, 8)


def test_low_detail_takes_fewer_tokens():
    _, (auto, low) = PictureReader(rules=RULES).look(user(image(address(png(1000, 800))), image(address(png(1000, 800)), detail="low")))
    assert auto.tokens > 900
    assert low.tokens <= 256


def test_a_video_says_how_many_frames_are_looked_at(clip):
    url = address(clip("bikes.mp4"), "video/mp4")
    settings = ({}, {"fps": 3}, {"num_frames": 3})
    parts = [{"type": "video_url", "video_url": {"url": url, **more}} for more in settings]
    _, pictures = PictureReader(rules=RULES).look(user(*parts))
    assert [picture.frames for picture in pictures] == [20, 30, 4]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (image("https://example.com/a.png"), "addresses of other machines are not fetched here"),
        (image("file:///etc/hostname"), "files of this machine are not read here"),
        (image("/etc/hostname"), "is no address that is read here"),
        (image("ftp://example.com/a"), "is no address that is read here"),
        (image(""), "is no address that is read here"),
        (image("data:image/png,abc"), "must read data:TYPE;base64"),
        (image("data:image/png;base64,@@@@"), "is not base64"),
        (image(address(b"x" * 4000)), "carries more than 3,000 bytes"),
        (image(address(png())[:-40]), "damaged|base64"),
        ({"type": "video_url", "video_url": {"url": address(png())}}, "no video of a known container"),
        ({"type": "video_url", "video_url": {"url": address(png()), "fps": -1}}, "fps must be a number above 0"),
        ({"type": "video_url", "video_url": {"url": address(png()), "num_frames": "9"}}, "count of frames must be"),
    ],
)
def test_what_cannot_be_seen_is_refused_with_its_place(part, says):
    sight = PictureReader(rules=RULES, images=ImageLimits(file_bytes=3000))
    with pytest.raises(RequestError, match=says) as error:
        sight.look(user({"type": "text", "text": "Look:"}, part))
    assert error.value.field == "messages[0].content[1]"
    assert "messages[0].content[1]" in str(error.value)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (image(address(png()), detail="ultra"), "detail is 'ultra'; allowed: auto, high, low"),
        (image(address(png()), size=3), "'size' is not a setting of a part of type image_url"),
        ({"type": "video_url", "video_url": {"url": "data:", "frames": 3}}, "'frames' is not a setting of a part of type video_url"),
        ({"type": "image_url", "image_url": 7}, "must be an address"),
        ({"type": "audio_url"}, "type 'audio_url' is not known"),
    ],
)
def test_parts_that_are_none_are_refused(part, says):
    with pytest.raises(TokenizerError, match=says):
        PictureReader(rules=RULES).look(user(part))


def test_what_a_stranger_says_of_tokens_is_not_believed():
    part = image(address(png())) | {"tokens": 1}
    (message,), _ = PictureReader(rules=RULES).look(user(part))
    assert message.parts[0].tokens == 8


def test_a_conversation_has_room_for_so_many_pictures():
    with pytest.raises(RequestError, match="more than 2 images and videos"):
        PictureReader(rules=RULES, pictures=2).look(user(*[image(address(png()))] * 3))
    with pytest.raises(RequestError, match=r"content\[1\]: the images and videos up to here take 16 tokens; at most 15"):
        PictureReader(rules=RULES, tokens=15).look(user(*[image(address(png()))] * 2))


def test_messages_without_pictures_stay_what_they_are():
    messages = (Message("user", "Hello"), Message("assistant", (Text("Hi"),)))
    assert PictureReader(rules=RULES).look(messages) == (messages, ())


@pytest.fixture
def media(tmp_path):
    """A folder with `a b.png`, a deeper one, and links; a secret beside it."""
    folder, secret = tmp_path / "media", tmp_path / "secret.png"
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "a b.png", folder / "deep" / "c.png", secret):
        path.write_bytes(png())
    (folder / "link.png").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    (folder / "friend.png").symlink_to("deep/c.png")
    return folder


def test_files_of_the_folder_are_read_however_they_are_written(media):
    folder = Sources(folder=media)
    for address in (
        f"file://{media}/a%20b.png", f"file://localhost{media}/a%20b.png", f"FILE:{media}/a b.png",
        "file:a%20b.png", "file:deep/c.png", "file://deep/c.png", "file:deep/../a b.png", "file:friend.png",
    ):  # fmt: skip
        assert folder.read(address, 10_000) == png()
    with pytest.raises(RequestError, match="no address that is read here"):
        folder.read(f"{media}/a b.png", 10_000)
    with pytest.raises(RequestError, match="larger than 10 bytes"):
        folder.read("file:a b.png", 10)


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "%2e%2e/secret.png", "deep/../../secret.png", "link.png", "up/secret.png", "/etc/hostname", "//etc/hostname", "~/x"],
)
def test_no_file_outside_the_folder_is_read(media, name):
    for address in (f"file:{name}", f"file://{media}/{name}", f"file://{name}"):
        with pytest.raises(RequestError, match=r"only files in the folder|No such file") as refused:
            Sources(folder=media).read(address, 10_000)
        assert "root:" not in str(refused.value)


@pytest.mark.parametrize("name", ["", "deep", "pipe", "missing.png", "a b.png/x", "nul%00.png", "x" * 5000])
def test_what_is_no_file_is_refused_and_nothing_stays_open(media, name):
    os.mkfifo(media / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RequestError, match=r"is no file|cannot be read"):
        Sources(folder=media).read(f"file:{name}", 10_000)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_that_is_put_there_meanwhile_is_not_followed(media, monkeypatch):
    """Between the look at the path and the opening the folder's file becomes a link."""
    looked = Path.resolve

    def swap(path, strict=False):
        found = looked(path, strict)
        if path.name == "c.png":
            (media / "deep").rename(media / "was")
            (media / "deep").symlink_to(media.parent)
            (media.parent / "c.png").write_bytes(b"root:")
        return found

    monkeypatch.setattr(Path, "resolve", swap)
    with pytest.raises(RequestError, match="cannot be read"):
        Sources(folder=media).read("file:deep/c.png", 10_000)


def test_whoever_opened_all_files_reads_any(media):
    everything, outside = Sources(paths=True), media.parent / "secret.png"
    assert everything.read(str(outside), 10_000) == png()
    assert everything.read(f"file://{outside}", 10_000) == png()
    for path, most, says in ((outside, 10, "larger than 10"), (media / "no", 10, "cannot be read"), (media, 10_000_000, "is no file")):
        with pytest.raises(RequestError, match=says):
            everything.read(str(path), most)


def test_addresses_of_machines_go_to_whoever_fetches():
    asked = []
    sources = Sources(fetch=lambda url, most: asked.append((url, most)) or png())
    _, (picture,) = PictureReader(rules=RULES, sources=sources).look(user(image("https://example.com/a.png")))
    assert picture.tokens == 8
    assert asked == [("https://example.com/a.png", 20 << 20)]


def test_parts_keep_what_they_say():
    video = {"type": "video_url", "video_url": {"url": "data:x", "fps": 0.5, "num_frames": 8}}
    message = Message.from_mapping({"role": "user", "content": [video, image("data:y", detail="low")]})
    assert message.media == (Video(None, "data:x", 0.5, 8), Image(None, "data:y", "low"))

"""Conversations with pictures: where they may come from, how they are measured, and the ids that come of them."""

import base64
import io

import pytest
from PIL import Image as Pillow

from ernie45.errors import RequestError, TokenizerError
from ernie45.tokens.images import ImageLimits
from ernie45.tokens.messages import Image, Message, Text, Video
from ernie45.tokens.pictures import PixelRules
from ernie45.tokens.sight import Sight, Sources
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
    (message,), (picture,) = Sight(rules=RULES).look(user(part, {"type": "text", "text": "What is this?"}))
    assert picture.tokens == 8  # 70 x 98: 2.5 and 3.5 of 28 round to 2 and 4
    assert [type(part) for part in message.parts] == [Image, Text]
    assert message.parts[0].tokens == 8


def test_a_conversation_becomes_ids_with_a_place_for_every_token(tagged, clip):
    template = family_template("ernie-vl", tagged)
    sight = Sight(rules=RULES, choice=FrameChoice(count=4))
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
    _, (auto, low) = Sight(rules=RULES).look(user(image(address(png(1000, 800))), image(address(png(1000, 800)), detail="low")))
    assert auto.tokens > 900
    assert low.tokens <= 256


def test_a_video_says_how_many_frames_are_looked_at(clip):
    url = address(clip("bikes.mp4"), "video/mp4")
    settings = ({}, {"fps": 3}, {"num_frames": 3})
    parts = [{"type": "video_url", "video_url": {"url": url, **more}} for more in settings]
    _, pictures = Sight(rules=RULES).look(user(*parts))
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
    sight = Sight(rules=RULES, images=ImageLimits(file_bytes=3000))
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
        Sight(rules=RULES).look(user(part))


def test_what_a_stranger_says_of_tokens_is_not_believed():
    part = image(address(png())) | {"tokens": 1}
    (message,), _ = Sight(rules=RULES).look(user(part))
    assert message.parts[0].tokens == 8


def test_a_conversation_has_room_for_so_many_pictures():
    with pytest.raises(RequestError, match="more than 2 images and videos"):
        Sight(rules=RULES, pictures=2).look(user(*[image(address(png()))] * 3))
    with pytest.raises(RequestError, match=r"content\[1\]: the images and videos up to here take 16 tokens; at most 15"):
        Sight(rules=RULES, tokens=15).look(user(*[image(address(png()))] * 2))


def test_messages_without_pictures_stay_what_they_are():
    messages = (Message("user", "Hello"), Message("assistant", (Text("Hi"),)))
    assert Sight(rules=RULES).look(messages) == (messages, ())


def test_files_are_read_where_the_door_is_open(tmp_path):
    inside, outside = tmp_path / "media" / "a b.png", tmp_path / "secret.png"
    inside.parent.mkdir()
    inside.write_bytes(png())
    outside.write_bytes(png())
    (inside.parent / "link.png").symlink_to(outside)
    folder = Sources(folder=inside.parent)
    assert folder.read(f"file://{inside.parent}/a%20b.png", 10_000) == png()
    for name in (outside, inside.parent / ".." / "secret.png", inside.parent / "link.png", "/etc/hostname"):
        with pytest.raises(RequestError, match="only files in the folder"):
            folder.read(f"file://{name}", 10_000)
    with pytest.raises(RequestError, match="no address that is read here"):
        folder.read(str(inside), 10_000)
    everything = Sources(paths=True)
    assert everything.read(str(outside), 10_000) == png()
    assert everything.read(f"file://{outside}", 10_000) == png()
    with pytest.raises(RequestError, match="larger than 10 bytes"):
        everything.read(str(outside), 10)
    with pytest.raises(RequestError, match="cannot be read"):
        everything.read(str(tmp_path / "missing.png"), 10)
    with pytest.raises(RequestError, match="is no file"):
        everything.read(str(tmp_path), 10_000_000)


def test_addresses_of_machines_go_to_whoever_fetches():
    asked = []
    sources = Sources(fetch=lambda url, most: asked.append((url, most)) or png())
    _, (picture,) = Sight(rules=RULES, sources=sources).look(user(image("https://example.com/a.png")))
    assert picture.tokens == 8
    assert asked == [("https://example.com/a.png", 20 << 20)]


def test_parts_keep_what_they_say():
    video = {"type": "video_url", "video_url": {"url": "data:x", "fps": 0.5, "num_frames": 8}}
    message = Message.from_mapping({"role": "user", "content": [video, image("data:y", detail="low")]})
    assert message.media == (Video(None, "data:x", 0.5, 8), Image(None, "data:y", "low"))

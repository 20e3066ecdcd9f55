"""Videos: which frames are chosen, that they are the right ones, what is written on them, and what decoding may not do."""

import io
import json
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

from ernie45.errors import RequestError
from ernie45.tokens.decode_video import Index, container, decode, scan, stamp
from ernie45.tokens.pictures import PixelRules
from ernie45.tokens.video import FrameChoice, VideoLimits, read_video, spread, timestamp

RULES = PixelRules(frame_min=56 * 56, frame_max=112 * 112)
LIMITS = VideoLimits()


@pytest.mark.parametrize(
    ("total", "count", "take", "wanted"),
    [
        (100, 16, "middle", "2 8 14 21 27 33 39 46 52 58 64 71 77 83 89 96"),
        (100, 16, "leading", "0 6 12 18 25 31 37 43 50 56 62 68 75 81 87 93"),
        (95, 20, "middle", "1 6 11 16 20 25 30 35 39 44 49 54 58 63 68 73 77 82 87 92"),
        (5, 16, "middle", "0 1 2 3 4"),
        (1, 1, "leading", "0"),
    ],
)
def test_frames_are_spread_as_published(total, count, take, wanted):
    assert spread(total, count, take) == tuple(map(int, wanted.split()))


@given(st.integers(1, 20_000), st.integers(1, 200))
def test_spreading_is_rising_and_equals_numpy_linspace(total, count):
    edges = np.linspace(0, total, min(count, total) + 1).astype(int)
    assert spread(total, count, "leading") == tuple(edges[:-1])
    middle = spread(total, count, "middle")
    assert middle == tuple((a + b - 1) // 2 for a, b in pairwise(edges.tolist()))
    assert all(a < b for a, b in pairwise(middle))
    assert middle[-1] < total


@pytest.mark.parametrize(
    ("choice", "total", "duration", "count"),
    [
        (FrameChoice(), 300, 10.0, 20),  # two a second
        (FrameChoice(), 300, 4.0, 16),  # not below 16
        (FrameChoice(), 9000, 300.0, 180),  # not above 180
        (FrameChoice(), 12, 4.0, 12),  # all there are
        (FrameChoice(fps=0.5, least=1), 300, 10.0, 5),
        (FrameChoice(count=3), 300, 10.0, 3),
        (FrameChoice(count=3, fps=30), 300, 10.0, 3),
    ],
)
def test_how_many_frames_are_looked_at(choice, total, duration, count):
    assert len(choice.frames(total, duration)) == count


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fps": 0}, "fps must be a number above 0"),
        ({"fps": True}, "fps must be"),
        ({"fps": float("nan")}, "fps must be"),
        ({"count": 0}, "count of frames must be"),
        ({"most": 1.5}, "most of frames must be"),
        ({"least": 20, "most": 10}, "least is 20 frames, more than most, 10"),
        ({"take": "last"}, "take must be 'middle' or 'leading'"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(change, says):
    with pytest.raises(RequestError, match=says):
        FrameChoice(**change)


def test_times_are_written_as_published():
    times = (0.0, 1.5, 59.994, 61.25, 3599.5, 3661.01, 360_000.0)
    written = ("00:00:00.00", "00:00:01.50", "00:00:59.99", "00:01:01.25", "00:59:59.50", "01:01:01.01", "100:00:00.00")
    assert [timestamp(time) for time in times] == [f"time: {text}" for text in written]


JUDGE = """
import sys, types, json, importlib.machinery
def made(name, **content):
    module = types.ModuleType(name); module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__dict__.update(content); sys.modules[name] = module
    return module
functional = made("torchvision.transforms.functional", InterpolationMode=type("Modes", (), {"__getattr__": lambda self, name: name})(),
    to_pil_image=None, pil_to_tensor=None)
for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.io"):
    made(name, functional=functional, __version__="0.28", InterpolationMode=functional.InterpolationMode)
made("torchvision.transforms.v2.functional", **functional.__dict__)
from transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeVideoProcessor as Judge
asked = json.loads(sys.argv[1])
own = types.SimpleNamespace(num_frames=None, min_frames=16, max_frames=180)
chosen = [Judge.sample_frames(own, types.SimpleNamespace(total_num_frames=t, fps=r), fps=f).tolist() for t, r, f in asked["samples"]]
print(json.dumps({"chosen": chosen, "times": [Judge._convert_timestamp(own, t) for t in asked["times"]]}))
"""
# transformers' video processor needs torchvision to be imported; what is asked of it here does not use it. A process of its own, so that
# nobody else meets the stand-in.


def test_leading_frames_and_times_equal_transformers():
    samples = [(100, 25, None), (300, 30, 2), (9000, 30, 2), (40, 10, 4), (17, 5, 1)]
    asked = {"samples": samples, "times": [0.0, 61.25, 3661.01]}
    run = subprocess.run([sys.executable, "-c", JUDGE, json.dumps(asked)], capture_output=True, text=True, check=True)
    said = json.loads(run.stdout)
    for (total, rate, fps), wanted in zip(samples, said["chosen"], strict=True):
        choice = FrameChoice(take="leading", fps=fps) if fps else FrameChoice(take="leading", count=min(max(total, 16), 180))
        assert list(choice.frames(total, total / rate)) == wanted
    assert [timestamp(time) for time in asked["times"]] == said["times"]


def movie(count, size=(64, 48), format="mp4", codec="mpeg4", rate=10, group=12) -> bytes:
    """A film whose frames tell their number: three patches of grey, each a base-6 digit."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = group
        for number in range(count):
            image = Image.new("RGB", size)
            for place in range(3):
                image.paste((number // 6**place % 6 * 50,) * 3, (place * size[0] // 3, 0, (place + 1) * size[0] // 3, size[1]))
            out.mux(stream.encode(av.VideoFrame.from_image(image)))
        out.mux(stream.encode())
    return file.getvalue()


def number_of(image):
    width, height = image.size
    digits = [round(image.getpixel(((2 * place + 1) * width // 6, height // 2))[0] / 50) for place in range(3)]
    return sum(digit * 6**place for place, digit in enumerate(digits))


@pytest.mark.parametrize(("format", "codec"), [("mp4", "mpeg4"), ("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")])
@pytest.mark.parametrize("group", [1, 12, 250])
def test_the_chosen_frames_are_the_right_ones(format, codec, group):
    data = movie(100, format=format, codec=codec, group=group)
    kind = container(data[:16])
    index = scan(io.BytesIO(data), kind, LIMITS)
    assert len(index.times) == 100
    assert index.duration == pytest.approx(10.0, rel=0.02)
    for wanted in ((0,), (99,), (0, 1, 50, 51, 98), spread(100, 16, "middle"), tuple(range(100))):
        assert [number_of(image) for image in decode(io.BytesIO(data), kind, index, wanted)] == list(wanted)


def test_a_clip_is_its_frames_resized_in_pairs():
    clip = read_video(movie(33), RULES, FrameChoice(count=5, timestamps=False))
    assert (clip.indices, clip.total) == ((2, 9, 15, 22, 29), 33)
    assert clip.seconds == pytest.approx((0.2, 0.9, 1.5, 2.2, 2.9))
    picture = clip.picture
    assert (picture.kind, picture.frames) == ("video", 6)
    assert (picture.height, picture.width) == RULES.size(48, 64, "video")
    size = picture.height * picture.width * 3
    frames = [picture.rgb[n * size : (n + 1) * size] for n in range(6)]
    assert [number_of(Image.frombytes("RGB", (picture.width, picture.height), frame)) for frame in frames] == [2, 9, 15, 22, 29, 29]
    assert frames[4] == frames[5]


def test_timestamps_are_drawn_at_the_upper_left_only():
    plain, stamped = (read_video(movie(16, (160, 120)), RULES, FrameChoice(timestamps=on)).picture for on in (False, True))
    images = [Image.frombytes("RGB", (p.width, p.height), p.rgb[: p.width * p.height * 3]) for p in (plain, stamped)]
    left, top, right, bottom = ImageChops.difference(*images).getbbox()
    assert (left, top) <= (4, 4)
    assert right > images[0].width // 2
    assert bottom < images[0].height // 4
    letters = images[1].crop((0, 0, right, bottom))
    assert max(low for low, _ in letters.getextrema()) < 60  # black letters
    assert min(high for _, high in letters.getextrema()) > 200  # white rims


def test_frames_too_small_for_letters_stay_as_they_are():
    image = Image.new("RGB", (9, 9), (1, 2, 3))
    stamp(image, 1.0, None)
    assert image.getcolors() == [(81, (1, 2, 3))]


@pytest.mark.parametrize(("name", "total"), [("bikes.mp4", 250), ("carphone_pristine.mp4", 120)])
def test_real_clips(clip, name, total):
    read = read_video(clip(name), RULES, FrameChoice(count=4, timestamps=False))
    assert read.total == total
    with av.open(io.BytesIO(clip(name))) as opened:
        one_by_one = [frame.to_image() for frame in opened.decode(video=0)]
    high, wide = read.picture.height, read.picture.width
    for place, number in enumerate(read.indices):
        wanted = one_by_one[number].resize((wide, high), Image.Resampling.BICUBIC).tobytes()
        assert read.picture.rgb[place * len(wanted) : (place + 1) * len(wanted)] == wanted


def test_phones_turn_their_films():
    """The matrix in the track's head turns by 90 degrees, as a phone writes it."""
    data = bytearray(movie(16, (64, 32)))
    at = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">i", data, at) == (0x10000,)
    struct.pack_into(">9i", data, at, 0, 0x10000, 0, -0x10000, 0, 0, 0x20 << 16, 0, 0x40000000)
    picture = read_video(bytes(data), RULES).picture
    assert picture.height > picture.width


def test_an_animated_gif_is_a_film_too():
    frames = [Image.new("L", (40, 30), 40 * n) for n in range(5)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=200)
    clip = read_video(file.getvalue(), RULES, FrameChoice(timestamps=False))
    assert clip.total == 5
    assert clip.picture.frames == 6


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no video of a known container"),
        (b"hello, world, this is text", "no video of a known container"),
        (PLAYLIST, "no video of a known container"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "no video of a known container"),
        (b"\0\0\0\x18ftypisom" + bytes(100), "damaged|no video"),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "damaged|no video"),
        (b"RIFF\0\0\0\0AVI " + bytes(100), "damaged|no video"),
    ],
    ids=range(7),
)
def test_wrong_files_are_refused(data, says):
    with pytest.raises(RequestError, match=says):
        read_video(data, RULES)


def test_a_film_that_is_cut_off_is_refused_or_shows_what_there_is():
    data = movie(40, format="webm", codec="libvpx-vp9")
    clip = read_video(data[: len(data) * 2 // 3], RULES, FrameChoice(count=4))
    assert 0 < clip.total < 40
    with pytest.raises(RequestError, match="damaged"):
        read_video(movie(40)[:-400], RULES)  # an MP4's table of contents stands at its end


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"file_bytes": 1000}, "the video file has [0-9,]+ bytes; at most 1,000"),
        ({"frames": 39}, "the video has more than 39 frames"),
        ({"frame_pixels": 3071}, "frames have 64x48 pixels; at most 3,071"),
        ({"picture_bytes": 100_000}, "16 frames of [0-9x]+ pixels are [0-9,]+ bytes; at most 100,000: choose fewer frames"),
        ({"memory_bytes": 120 << 20}, "memory"),
        ({"wall_seconds": 0.01}, "took longer than 0.01 s"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_limit_holds(change, says):
    with pytest.raises(RequestError, match=says):
        read_video(movie(40), RULES, FrameChoice(), replace(LIMITS, **change))


def test_processor_time_is_limited(monkeypatch):
    """A child that never ends, in place of a file that would take that long."""
    from ernie45.tokens import video

    monkeypatch.setattr(video.sys, "executable", "/bin/true")
    spin = "import sys, json; from ernie45.tokens.decode_video import limit_process; from ernie45.tokens.video import VideoLimits"
    command = [f"{spin}; limit_process(VideoLimits(cpu_seconds=1))\nwhile True: pass"]
    real = subprocess.Popen
    python = sys.executable if sys.executable != "/bin/true" else "python3"
    monkeypatch.setattr(video.subprocess, "Popen", lambda _, **kept: real([python, "-c", *command], **kept))
    with pytest.raises(RequestError, match="more than 60 s of processor time"):
        read_video(movie(2), RULES)


def test_a_child_that_lies_is_not_believed(monkeypatch):
    from ernie45.tokens import video

    real = subprocess.Popen
    for said in (
        "",
        "nonsense",
        "[1]",
        '{"frames": 1, "height": 56, "width": 56}',
        '{"frames": 2, "height": -56, "width": -56}',
        '{"frames": 1e9}',
    ):
        child = f"import sys; sys.stdout.write({said!r} + chr(10))"
        monkeypatch.setattr(video.subprocess, "Popen", lambda _, child=child, **kept: real([sys.executable, "-c", child], **kept))
        with pytest.raises(RequestError, match="broke down"):
            read_video(movie(2), RULES)


def test_the_index_reckons_time_by_rate():
    from fractions import Fraction

    assert Index(Fraction(30000, 1001), list(range(300))).duration == pytest.approx(10.01)

"""The resize rule, the patches and the rules of a folder: the published vectors, and numbers equal to transformers' processor."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import CheckpointError, RequestError
from ernie45.tokens.images import ImageLimits, open_image, read_image
from ernie45.tokens.patches import normalised, patch_bytes, patches
from ernie45.tokens.pictures import Picture, PixelRules, read_pixel_rules, resized

RULES = PixelRules()


@pytest.mark.parametrize(
    ("size", "becomes", "tokens"),
    [
        ((10, 10), (56, 56), 4),
        ((28, 28), (56, 56), 4),
        ((42, 42), (56, 56), 4),
        ((70, 98), (56, 112), 8),  # halves round to even: 2.5 to 2, 3.5 to 4
        ((126, 98), (112, 112), 16),
        ((224, 224), (224, 224), 64),
        ((480, 640), (476, 644), 391),
        ((1080, 1920), (1092, 1932), 2691),
        ((2160, 3840), (1624, 2912), 6032),
        ((4000, 6000), (1792, 2688), 6144),
        ((13, 300), (28, 308), 11),
        ((10, 2100), (28, 5600), 200),
        ((2100, 10), (5600, 28), 200),
        ((1, 1), (56, 56), 4),
        ((1, 100_000), (28, 5600), 200),
    ],
)
def test_images_are_resized_as_published(size, becomes, tokens):
    assert RULES.size(*size) == becomes
    assert becomes[0] * becomes[1] // 28**2 == tokens


@pytest.mark.parametrize(
    ("size", "becomes", "tokens"),
    [
        ((240, 320), (420, 560), 300),
        ((480, 854), (476, 840), 510),
        ((720, 1280), (728, 1288), 1196),
        ((1080, 1920), (700, 1288), 1150),
    ],
)
def test_video_frames_are_resized_as_published(size, becomes, tokens):
    assert RULES.size(*size, "video") == becomes
    picture = Picture("video", 2, *becomes, bytes(2 * becomes[0] * becomes[1] * 3))
    assert picture.tokens == tokens


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_every_size_is_in_bounds_and_equals_transformers_unless_thin(height, width):
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import smart_resize

    high, wide = RULES.size(height, width)
    assert high % 28 == wide % 28 == 0
    assert RULES.image_min <= high * wide <= RULES.image_max
    if min(height, width) > 14 and max(height, width) <= 200 * min(height, width):  # the thin ones are the known difference
        assert (high, wide) == smart_resize(height, width, 28, RULES.image_min, RULES.image_max)


def test_bounds_that_nothing_fits_are_refused():
    with pytest.raises(RequestError, match="cannot be brought to between"):
        resized(100, 100, 28, 30 * 30, 31 * 31)


def judge(**changes):
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    return Ernie4_5_VLMoeImageProcessorPil(**changes)


@pytest.mark.parametrize("name", ["astronaut.png", "rocket.jpg", "coins.png", "page.png", "no_time_for_that_tiny.gif"])
def test_real_pictures_give_the_numbers_of_transformers(photo, name):
    data = photo(name)
    ours = read_image(data, RULES)
    theirs = judge()(open_image(data, ImageLimits()), return_tensors="np")
    assert [ours.grid] == [tuple(grid) for grid in theirs["image_grid_thw"].tolist()]
    # The same bytes in the same order; theirs go through float32 on the way to the same formula.
    np.testing.assert_allclose(patches(ours, RULES), theirs["pixel_values"], rtol=0, atol=2e-6)


def test_video_frames_follow_each_other_as_images_would(photo):
    from PIL import Image

    frames = [open_image(photo(name), ImageLimits()).resize((320, 240)) for name in ("astronaut.png", "rocket.jpg")]
    high, wide = RULES.size(240, 320, "video")
    rgb = b"".join(frame.resize((wide, high), Image.Resampling.BICUBIC).tobytes() for frame in frames)
    ours = patches(Picture("video", 2, high, wide, rgb), RULES)
    size = {"shortest_edge": RULES.frame_min, "longest_edge": RULES.frame_max}
    theirs = judge(size=size)(frames, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_patch_order_is_blocks_of_four_and_channels_outermost():
    pixels = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(1, 4, 8, 3)
    found = patch_bytes(Picture("image", 1, 4, 8, pixels.tobytes(), patch=2, merge=2))
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6), (2, 4), (2, 6)]
    for patch, (y, x) in zip(found, corners, strict=True):
        assert patch.tolist() == pixels[0, y : y + 2, x : x + 2].transpose(2, 0, 1).ravel().tolist()


def test_normalising_is_the_formula_in_float32():
    everything = np.tile(np.arange(256, dtype=np.uint8), 3)[None]
    wanted = (np.arange(256) / 255 - np.array(RULES.mean)[:, None]) / np.array(RULES.std)[:, None]
    np.testing.assert_array_equal(normalised(everything, RULES), wanted.reshape(1, -1).astype(np.float32))


def test_digests_tell_pictures_of_equal_bytes_apart():
    rgb = bytes(56 * 112 * 3 * 2)
    pictures = [Picture("video", 2, 56, 112, rgb), Picture("video", 2, 112, 56, rgb), Picture("image", 1, 112, 112, rgb)]
    assert len({picture.digest for picture in pictures}) == 3
    assert pictures[0].digest == Picture("video", 2, 56, 112, bytes(rgb)).digest


def test_rules_of_a_folder_are_read_by_all_their_names(tmp_path):
    assert read_pixel_rules(tmp_path) == RULES
    original = {"min_pixels": 784, "max_pixels": 7840, "patch_size": 14, "merge_size": 2, "temporal_conv_size": 2, "image_mean": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(original | {"do_resize": True, "resample": 3}))
    assert read_pixel_rules(tmp_path) == replace(RULES, image_min=784, image_max=7840, mean=(0.5, 0.5, 0.5))
    nested = {
        "image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 31360}},
        "video_processor": {"size": {"shortest_edge": 1568, "longest_edge": 15680}},
    }
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "Roboto-Regular.ttf").write_bytes(b"")
    font = str(tmp_path / "Roboto-Regular.ttf")
    assert read_pixel_rules(tmp_path) == replace(RULES, image_max=31360, frame_min=1568, frame_max=15680, font=font)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[1]", "no table of settings"),
        ('{"min_pixels": "many"}', "image_min of the pixel rules must be a whole number"),
        ('{"patch_size": 0}', "patch of the pixel rules"),
        ('{"image_mean": [1, 2]}', "mean of the pixel rules must be three numbers"),
        ('{"image_std": [0, 1, 1]}', "std of the pixel rules must be above 0"),
        ('{"do_normalize": false}', "do_normalize is False; only true is supported"),
    ],
)
def test_damaged_rules_are_refused_with_the_file(tmp_path, text, says):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=says) as error:
        read_pixel_rules(tmp_path)
    assert "preprocessor_config.json" in str(error.value)

"""Positions of prompts with pictures: the vectors of the published processor, and what cannot be placed."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import ConfigError, RequestError
from ernie45.models.places import check_grid, is_vision, place, tokens_of
from ernie45.models.vision_config import VisionConfig

VISION = VisionConfig(expert_size=8)
SEEN = VISION.image_id


def columns(tokens, grids, vision=VISION):
    places = place(tokens, grids, vision)
    return [places.positions_T3[:, axis].tolist() for axis in range(3)], places.following


def test_an_image_between_text():
    found, following = columns([5, 5, 5] + [SEEN] * 6 + [5, 5], [(1, 4, 6)])
    assert found == [[0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7], [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7], [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]]
    assert following == 8


def test_a_video_between_text():
    found, following = columns([5] + [SEEN] * 6 + [5], [(6, 2, 4)])
    assert found == [[0, 1, 1, 2, 2, 3, 3, 4], [0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 2, 1, 2, 1, 2, 4]]
    assert following == 5


def test_a_long_video_by_both_rules():
    tokens = [5] * 3 + [SEEN] * 5 * 4 + [5]
    found, following = columns(tokens, [(10, 4, 4)])
    assert (found[0][-1], following) == (8, 9)
    found, following = columns(tokens, [(10, 4, 4)], VisionConfig(expert_size=8, position_rule="transformers"))
    assert (found[0][-1], following) == (5, 8), "decoding goes on behind the video's last frame, not behind the text"


def test_neighbouring_pictures_need_no_text_between():
    found, _ = columns([SEEN] * 8, [(1, 4, 4), (1, 4, 4)])
    assert found[0] == [0] * 4 + [2] * 4


def test_text_alone_counts():
    found, following = columns([5, 6, 7], [])
    assert found == [[0, 1, 2]] * 3
    assert following == 3


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3)), max_size=4))
def test_positions_never_go_back_over_a_picture(sizes):
    grids = [(1 if t == 1 else 2 * t, 2 * h, 2 * w) for t, h, w, _ in sizes]
    tokens = [5]
    for grid, (_, _, _, text) in zip(grids, sizes, strict=True):
        tokens += [SEEN] * tokens_of(grid, VISION) + [5] * text
    places = place(tokens, grids, VISION)
    assert places.positions_T3.shape == (len(tokens), 3)
    assert places.following == int(places.positions_T3.max()) + 1
    highest = places.positions_T3.max(dim=1).values
    text = [i for i, token in enumerate(tokens) if token == 5]
    assert all(int(highest[i]) > int(highest[:i].max()) for i in text[1:]), "text stands behind everything before it"


@pytest.mark.parametrize(
    ("tokens", "grids", "text"),
    [
        ([5, SEEN], [], "place 1 stands for a picture"),
        ([5], [(1, 2, 2)], "placeholders for 0"),
        ([SEEN] * 3, [(1, 4, 4)], "takes 4 placeholder tokens"),
        ([SEEN] * 2 + [5] + [SEEN] * 2, [(1, 4, 4)], "takes 4 placeholder tokens"),
        ([SEEN] * 5, [(1, 4, 4)], "place 4 stands for a picture"),
    ],
)
def test_placeholders_and_pictures_must_meet(tokens, grids, text):
    with pytest.raises(RequestError, match=re.escape(text)):
        place(tokens, grids, VISION)


@pytest.mark.parametrize("grid", [(3, 2, 2), (0, 2, 2), (1, 3, 2), (1, 2, 5), (1, 2), (1, 2, 2, 2), (1, -2, 2)])
def test_a_grid_that_no_picture_has(grid):
    with pytest.raises(RequestError, match="is no picture's"):
        check_grid(grid, VISION)


def test_markers_are_vision_for_experts_and_text_for_positions():
    tokens = [5, VISION.image_start_id, SEEN, VISION.image_end_id, VISION.video_start_id, VISION.video_end_id, 6]
    assert is_vision(torch.tensor(tokens), VISION).tolist() == [False, True, True, True, True, True, False]
    found, _ = columns(tokens, [(1, 2, 2)])
    assert found == [[0, 1, 2, 3, 4, 5, 6]] * 3


def test_an_unknown_rule_of_positions():
    with pytest.raises(ConfigError, match="did you mean 'original'"):
        VisionConfig(expert_size=8, position_rule="orginal")  # pyrefly: ignore[bad-argument-type]

"""Published sizes, and the sum over the real modules on the meta device."""

import pytest
import torch

from ernie45.models.counts import count_parameters, count_release, kv_bytes_per_token, weight_bytes
from ernie45.models.released import CHECKPOINTS, RELEASES, tiny
from ernie45.models.text import Decoder

# checkpoint: total, MTP block, active per token, active with head, KV bytes per token in bf16
PUBLISHED = {
    "ERNIE-4.5-0.3B": (360_748_032, 0, 254_841_856, 360_748_032, 18_432),
    "ERNIE-4.5-21B-A3B": (21_825_437_888, 123_217_920, 3_087_384_768, 3_352_150_208, 57_344),
    "ERNIE-4.5-300B-A47B": (299_484_163_264, 989_888_512, 46_232_087_744, 47_079_337_152, 221_184),
    "ERNIE-4.5-VL-28B-A3B": (29_399_294_336, 0, 3_087_384_768, 3_352_150_208, 57_344),
    "ERNIE-4.5-VL-424B-A47B": (423_526_285_184, 0, 46_232_087_744, 47_079_337_152, 221_184),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_equal_the_published_ones(name):
    release = CHECKPOINTS[name]
    count = count_release(release)
    assert (count.total, count.mtp, count.active, count.active_with_head, kv_bytes_per_token(release.text)) == PUBLISHED[name]


def test_vision_parts_of_the_28b():
    count = count_release(CHECKPOINTS["ERNIE-4.5-VL-28B-A3B"])
    assert (count.vision_tower, count.resampler) == (630_433_280, 144_225_280)
    assert count.vision_experts + count.routers // 2 == 6_799_197_888  # the published figure counts a bank with its router
    assert count_release(CHECKPOINTS["ERNIE-4.5-VL-424B-A47B"]).resampler == 173_072_384


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_counts_equal_the_modules(release):
    with torch.device("meta"):
        model = Decoder(release.text, release.vision)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    count = count_release(release)
    for part, beginning in (("vision_tower", "sight.tower."), ("resampler", "sight.resampler.")):
        assert sum(n for name, n in sizes.items() if name.startswith(beginning)) == getattr(count, part)
    assert sum(n for name, n in sizes.items() if ".vision.experts." in name) == count.vision_experts
    mtp = sum(n for name, n in sizes.items() if name.startswith("mtp."))
    assert mtp == count.mtp
    assert sum(sizes.values()) - mtp == count.total


@pytest.mark.parametrize(
    "changes", [{}, {"use_bias": True, "head_bias": True}, {"tie_embeddings": False}, {"use_bias": True, "tie_embeddings": False}]
)
@pytest.mark.parametrize("experts", [False, True])
def test_counts_equal_the_modules_in_every_shape(experts, changes):
    from dataclasses import replace

    config = replace(tiny(experts=experts, num_mtp=1), **changes)
    count = count_parameters(config)
    assert sum(p.numel() for p in Decoder(config).parameters()) == count.total + count.mtp


def test_bytes():
    count = count_release(CHECKPOINTS["ERNIE-4.5-21B-A3B"])
    assert weight_bytes(count, 16) == 2 * (21_825_437_888 + 123_217_920)
    assert weight_bytes(count, 4) * 4 == weight_bytes(count, 16)


def test_there_are_fifteen_checkpoints_with_distinct_names():
    assert len(RELEASES) == len(CHECKPOINTS) == 15
    assert all(name.startswith("ERNIE-4.5-") for name in CHECKPOINTS)

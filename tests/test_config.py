"""Settings from plain data and from the process environment: what is known is honoured, everything else is answered."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from ernie45.config import Environment, from_mapping, shorten_thread_waits
from ernie45.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    page_size: int = 16
    ratio: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["fast", "exact"] = "exact"
    inner: Inner = field(default_factory=Inner)
    where: Path | None = None
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")


def test_nested_values_are_built():
    got = from_mapping(
        Outer, {"name": "x", "inner": {"page_size": 4, "ratio": 1}, "where": "a/b", "sizes": [1, 2], "pair": [3, "c"]}, "serve"
    )
    assert got == Outer(name="x", inner=Inner(page_size=4, ratio=1.0), where=Path("a/b"), sizes=(1, 2), pair=(3, "c"))
    assert isinstance(got.inner.ratio, float)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "x", "inner": {"page_sise": 4}}, ["serve.inner.page_sise", "page_size"]),
        ({}, ["serve", "name"]),
        ({"name": 3}, ["serve.name", "str", "3"]),
        ({"name": "x", "kind": "fats"}, ["serve.kind", "fast"]),
        ({"name": "x", "inner": 4}, ["serve.inner", "table"]),
        ({"name": "x", "inner": {"page_size": True}}, ["page_size", "int", "True"]),
        ({"name": "x", "inner": {"page_size": 1.5}}, ["page_size", "1.5"]),
        ({"name": "x", "sizes": [1, "2"]}, ["serve.sizes[1]", "'2'"]),
        ({"name": "x", "pair": [1]}, ["serve.pair"]),
        ([], ["serve", "list"]),
    ],
)
def test_a_wrong_setting_is_answered_with_its_place(data, words):
    with pytest.raises(ConfigError) as error:
        from_mapping(Outer, data, "serve")
    for word in words:
        assert word in str(error.value)


def test_the_environment_is_read_once_and_whole():
    env = {
        "ERNIE45_CACHE": "/c",
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "t",
        "NO_COLOR": "1",
        "ERNIE45_ISA": "avx2",
        "ERNIE45_STARTER_WHEEL": "/w",
    }
    got = Environment.read(env)
    read = Environment(cache_dir=Path("/c"), offline=True, hub_token="t", no_color=True, isa="avx2", starter_wheel=Path("/w"))
    assert replace(got, for_children={}) == read
    assert got.for_children == env, "a child process sees the same settings"
    assert Environment.read({**env, "AWS_SECRET": "s", "ERNIE45_API_KEYS": "k"}).for_children == env, "and nothing else"
    assert Environment.read({"XDG_CACHE_HOME": "/x"}).cache_dir == Path("/x/ernie45")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is 'maybe'; set it to 1 or 0"):
        Environment.read({"HF_HUB_OFFLINE": "maybe"})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_thread_waits_are_shortened_unless_somebody_chose(before, after):
    env = dict(before)
    shorten_thread_waits(env)
    assert env == after

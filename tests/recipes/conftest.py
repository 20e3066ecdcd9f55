"""Makes the small terminal and the scripted speaker importable as fixtures: tests are modules of their own."""

import importlib.util
from pathlib import Path

import pytest

from ernie45.config import Environment
from tests.recipes.lessons import model, one_thread, pairs, put_photos, rows, seer

__all__ = ["model", "one_thread", "pairs", "put_photos", "rows", "seer"]


def _module(name):
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def Screen():
    return _module("screen").Screen


@pytest.fixture(scope="session")
def ScriptSpeaker():
    return _module("script_speaker").ScriptSpeaker


@pytest.fixture(scope="session")
def PseudoTerminal():
    return _module("pseudo_terminal").PseudoTerminal


@pytest.fixture
def environment(tmp_path):
    return Environment(cache_dir=tmp_path / "cache", no_color=True)

"""From a word to a folder, with a Hub that is only pretended."""

import json
import sys
from types import SimpleNamespace

import pytest

from ernie45.config import Environment
from ernie45.errors import CheckpointError, MissingExtra
from ernie45.weights.hub import PATTERNS, missing_files, resolve

PUBLISHED = {"0.3B": "baidu/ERNIE-4.5-0.3B-PT", "ERNIE-4.5-0.3B-PT": "baidu/ERNIE-4.5-0.3B-PT", "21B-A3B": "baidu/ERNIE-4.5-21B-A3B-PT"}


class FakeHub:
    """Answers from a cache and a remote, both maps from repository to folder, and counts what was asked of the network."""

    def __init__(self, cache=(), remote=()):
        self.cache, self.remote, self.fetched = dict(cache), dict(remote), []

    def fetch(self, repository, *, offline):
        if offline:
            return self.cache.get(repository)
        self.fetched.append(repository)
        if repository not in self.remote:
            raise CheckpointError(f"{repository} is not on the Hub")
        return self.remote[repository]


def environment(tmp_path, **settings):
    return Environment(cache_dir=tmp_path, **settings)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_paths_come_first(tmp_path, model):
    hub = FakeHub()
    assert resolve(model, environment(tmp_path), published=PUBLISHED, client=hub) == model
    assert resolve(str(model), environment(tmp_path), published=PUBLISHED, client=hub) == model
    file = tmp_path / "x.gguf"
    file.touch()
    assert resolve(str(file), environment(tmp_path), published=PUBLISHED, client=hub) == file
    assert hub.fetched == []


@pytest.mark.parametrize("name", ["0.3B", "0.3b", "ernie-4.5-0.3b-pt", "baidu/ERNIE-4.5-0.3B-PT"])
def test_published_names_in_any_case(tmp_path, model, name):
    hub = FakeHub(remote={"baidu/ERNIE-4.5-0.3B-PT": model})
    assert resolve(name, environment(tmp_path), published=PUBLISHED, client=hub) == model
    assert hub.fetched == ["baidu/ERNIE-4.5-0.3B-PT"]


def test_makers_are_called_by_name(tmp_path):
    assert resolve("starter", environment(tmp_path), published=PUBLISHED, makers={"starter": lambda: tmp_path}) == tmp_path


def test_a_complete_cache_asks_no_network(tmp_path, model):
    hub = FakeHub(cache={"a/b": model})
    assert resolve("a/b", environment(tmp_path), published={}, client=hub) == model
    assert hub.fetched == []


def test_an_incomplete_cache_is_completed_or_refused(tmp_path, model):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text("{}")
    hub = FakeHub(cache={"a/b": half}, remote={"a/b": model})
    with pytest.raises(CheckpointError, match=r"without model.safetensors, and HF_HUB_OFFLINE"):
        resolve("a/b", environment(tmp_path, offline=True), published={}, client=hub)
    assert hub.fetched == []
    assert resolve("a/b", environment(tmp_path), published={}, client=hub) == model


def test_offline_and_not_in_the_cache(tmp_path):
    hub = FakeHub(remote={"a/b": tmp_path})
    with pytest.raises(CheckpointError, match="not in the cache, and HF_HUB_OFFLINE"):
        resolve("a/b", environment(tmp_path, offline=True), published={}, client=hub)
    assert hub.fetched == []


def test_a_repository_without_safetensors(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model.safetensors; it is not"):
        resolve("a/b", environment(tmp_path), published={}, client=FakeHub(remote={"a/b": tmp_path}))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("0.3", "did you mean '0.3B'"),
        ("21b-a3", "did you mean '21B-A3B'"),
        ("startr", "did you mean 'starter'"),
        ("gone/model.gguf", "no folder, no .gguf file"),
        ("../up", "no folder"),
        ("a/b/c", "no folder"),
        ("", "no folder"),
    ],
)
def test_unknown_names_show_the_nearest(tmp_path, name, word):
    makers = {"starter": lambda: tmp_path}
    with pytest.raises(CheckpointError, match=word):
        resolve(name, environment(tmp_path), published=PUBLISHED, makers=makers, client=FakeHub())


@pytest.mark.parametrize(
    ("name", "word"), [("model.bin", "pickle"), ("model.safetensors", "give the folder"), ("notes.txt", "give the folder")]
)
def test_files_that_are_no_model(tmp_path, name, word):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=word):
        resolve(str(tmp_path / name), environment(tmp_path), published=PUBLISHED)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_counts_as_missing(model, index):
    (model / "model.safetensors.index.json").write_text(index)
    assert missing_files(model) == ["model.safetensors.index.json"]


def test_every_shard_must_be_there(model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}))
    (model / "s2.safetensors").touch()
    assert missing_files(model) == ["s1.safetensors"]


def test_the_real_client_asks_for_no_pickle(tmp_path, model, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repository, **options):
        asked.append((repository, options))
        if options["local_files_only"]:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    here = environment(tmp_path, hf_home=tmp_path / "hf", hub_token="t")
    assert resolve("a/b", here, published={}) == model
    assert [options["local_files_only"] for _, options in asked] == [True, False]
    assert all(options["cache_dir"] == tmp_path / "hf" / "hub" and options["token"] == "t" for _, options in asked)
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in asked[0][1]["allow_patterns"])
    assert asked[0][1]["allow_patterns"] == list(PATTERNS)


@pytest.mark.parametrize(
    "kind", ["RepositoryNotFoundError", "GatedRepoError", "LocalEntryNotFoundError", "OSError", "HTTPError", "HFValidationError"]
)
def test_failures_of_the_real_client_are_answered(tmp_path, monkeypatch, kind):
    import huggingface_hub
    from huggingface_hub import errors

    http = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "RequestException"))
    raised = {"OSError": OSError, "HTTPError": http}.get(kind) or getattr(errors, kind)

    def snapshot(repository, *, local_files_only, **options):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        if issubclass(raised, errors.HfHubHTTPError):
            raise raised("no", response=SimpleNamespace(headers={}, request=None))
        raise raised("no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(CheckpointError, match=r"^a/b "):
        resolve("a/b", environment(tmp_path), published={})


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"ernie45\[hub\]"):
        resolve("a/b", environment(tmp_path), published={})

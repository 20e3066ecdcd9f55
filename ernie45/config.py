"""Settings as frozen values, and the one place that reads the process environment.

A config is a frozen dataclass, one class per concern. `from_mapping` builds one from plain data (YAML, JSON, a command line) and refuses
what it does not know, so that a misspelt setting is an error and never a silent default.
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ernie45.errors import CheckpointError, ConfigError, did_you_mean

T = TypeVar("T")

_TRUE = {"1", "true", "yes", "on"}
_CHILDREN_NAMES = {
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "TMPDIR",
    "TZ",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
    "SYSTEMROOT",
}
_CHILDREN_PREFIXES = (
    "ERNIE45_",
    "HF_",
    "LC_",
    "XDG_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "TORCH_",
    "MALLOC_",
    "SSL_",
    "PYTHON",
    "http",
    "HTTP",
    "no_",
    "NO_",
)
_FALSE = {"", "0", "false", "no", "off"}


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the process environment says, read once and passed in.

    `cache_dir` holds what the project makes for itself (starter model, chat history); `hf_home` is huggingface_hub's own cache, None for
    its default; `offline` forbids every download. `api_keys` are the server's (`ERNIE45_API_KEYS`, separated by commas); `for_children`
    is what a process that we start gets to see, which is what it needs and none of the keys. `rank` of `world` processes is a launcher's
    word (torchrun).
    """

    cache_dir: Path
    hf_home: Path | None = None
    offline: bool = False
    hub_token: str | None = None
    starter_wheel: Path | None = None
    isa: str | None = None
    no_color: bool = False
    rank: int = 0
    world: int = 1
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    for_children: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> "Environment":
        """Read the `ERNIE45_` names below, `HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`, `NO_COLOR`, `XDG_CACHE_HOME`, `RANK`, `WORLD_SIZE`.

        Raises `ConfigError` when a switch is neither on nor off, or a number is none.
        """
        env = os.environ if environ is None else environ
        launched = "RANK" in env and "WORLD_SIZE" in env  # one alone is left over from something else
        base = Path(env["XDG_CACHE_HOME"]) if env.get("XDG_CACHE_HOME") else Path.home() / ".cache"
        return cls(
            cache_dir=_path(env, "ERNIE45_CACHE") or base / "ernie45",
            hf_home=_path(env, "HF_HOME"),
            offline=_switch(env, "HF_HUB_OFFLINE"),
            hub_token=env.get("HF_TOKEN") or None,
            starter_wheel=_path(env, "ERNIE45_STARTER_WHEEL"),
            isa=env.get("ERNIE45_ISA") or None,
            no_color=bool(env.get("NO_COLOR")),
            rank=_whole(env, "RANK") if launched else 0,
            world=_whole(env, "WORLD_SIZE") if launched else 1,
            api_keys=tuple(key for key in env.get("ERNIE45_API_KEYS", "").split(",") if key.strip()),
            for_children={name: value for name, value in env.items() if _for_children(name)},
        )


def _for_children(name: str) -> bool:
    """Allowed by name: a list of what to leave out would miss the next secret. HF_TOKEN goes along, since a child downloads."""
    return name != "ERNIE45_API_KEYS" and (name in _CHILDREN_NAMES or name.startswith(_CHILDREN_PREFIXES))


def shorten_thread_waits(environ: MutableMapping[str, str] | None = None) -> None:
    """Let torch's idle threads sleep soon instead of spinning; call it before torch is imported. A value that is set already stays.

    A spinning thread holds a core that the thread it waits for may need: with one other busy process on two cores, decoding was measured at
    0.7 tokens/s with libgomp's own setting and 8.3 with this one, at no clear cost on an idle machine (docs/log.md).
    """
    env = os.environ if environ is None else environ
    if "OMP_WAIT_POLICY" not in env:
        env.setdefault("GOMP_SPINCOUNT", "1000")


def _path(env: Mapping[str, str], name: str) -> Path | None:
    return Path(env[name]).expanduser() if env.get(name) else None


def _whole(env: Mapping[str, str], name: str) -> int:
    if not env[name].strip().isdigit():
        raise ConfigError(f"the environment variable {name} is '{env[name]}'; a launcher such as torchrun sets it to a whole number")
    return int(env[name])


def _switch(env: Mapping[str, str], name: str) -> bool:
    word = env.get(name, "").strip().lower()
    if word not in _TRUE | _FALSE:
        raise ConfigError(f"the environment variable {name} is '{env[name]}'; set it to 1 or 0")
    return word in _TRUE


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file of settings that lies in a model folder. Raises `CheckpointError` when it cannot be read or is no table."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; mend or remove it") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is no table of settings; mend or remove it")
    return data


def from_mapping(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from plain data; nested dataclasses from nested mappings.

    `where` names the origin in errors, such as "serve.engine". Raises `ConfigError` for a key that is no setting, a missing required
    setting, or a value of the wrong type. A whole number is taken where a fraction is asked for; nothing else is converted.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a table of settings, not {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where}.{key} is not a setting{did_you_mean(str(key), fields)}")
    missing = [
        n for n, f in fields.items() if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}{did_you_mean(str(value), map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else from_mapping(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    plain = origin or hint
    if plain is Any:
        return value
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {getattr(plain, '__name__', plain)}, not {value!r}")


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    failure: ConfigError | None = None
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, value, where)
        except ConfigError as error:
            failure = error
    assert failure is not None
    raise failure

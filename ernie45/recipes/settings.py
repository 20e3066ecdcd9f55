"""Settings from a YAML file: read strictly, so that what a file says is what happens.

Two habits of YAML 1.1 are corrected: a key given twice is an error here, and `1e-4` is a number.
"""

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ernie45.config import from_mapping
from ernie45.errors import ConfigError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """A safe loader of our own, because resolvers are registered per class."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for n, (key, (key_node, _)) in enumerate(zip(keys, node.value, strict=True)):
        if key in keys[:n]:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: '{key}' is set twice")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def read_yaml(cls: type[T], path: str | Path, where: str) -> T:
    """Build the config `cls` from the YAML file `path`; `where` is the name its settings go by in errors.

    Raises `ConfigError` when the file cannot be read, is no table, or says something that is not a setting.
    """
    return from_mapping(cls, read_mapping(path), where)


def read_mapping(path: str | Path) -> Any:
    """What the YAML file says, plain; an empty table when it is empty. Raises `ConfigError` when it cannot be read."""
    try:
        # S506 does not apply: `_Loader` is a SafeLoader.
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the config file {path} is not UTF-8 at byte {error.start}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    return {} if data is None else data

"""A folder of adapters by name, as a server lists them. No tensors here; what is in their files is read by `models.adapter_layers`.

An adapter is a folder that holds PEFT's `adapter_config.json`. Its name is its folder's and comes from clients, so it is a plain word and
never a path: nothing but the folders that are there can be meant by it.
"""

import re
from pathlib import Path

from ernie45.errors import ConfigError, RequestError, did_you_mean

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class AdapterFolder:
    """The adapters in a folder, as they are at the moment of asking: folders may come and go. Raises `ConfigError` where there is none."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ConfigError(f"adapters: {root} is no folder; give one whose subfolders are PEFT adapters")
        self.root = root

    def names(self) -> list[str]:
        """The names there are, sorted. A folder whose name is no plain word is passed over."""
        try:
            entries = sorted(entry.name for entry in self.root.iterdir())
        except OSError:  # it was taken away while the server runs
            return []
        return [name for name in entries if self.holds(name)]

    def holds(self, name: str) -> bool:
        """Whether there is an adapter of this name."""
        return _NAME.fullmatch(name) is not None and (self.root / name / CONFIG).is_file()

    def find(self, name: str) -> Path:
        """The folder of an adapter. Raises `RequestError` for a name that is not there."""
        if not self.holds(name):
            raise RequestError(f"there is no adapter '{name[:100]}' here{did_you_mean(name[:100], self.names())}", "model")
        return self.root / name

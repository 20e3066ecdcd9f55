"""ERNIE 4.5 in PyTorch: run, adapt, compress and serve the whole family.

Public names load on first use, so that `import ernie45` stays under a tenth of a second and pulls in no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ernie45.engine.client import LLM
    from ernie45.engine.request import SamplingParams
    from ernie45.errors import ErnieError
    from ernie45.models.load import load_model

__version__ = "0.1.0"
__all__ = ["LLM", "ErnieError", "SamplingParams", "__version__", "load_model"]

_WHERE = {
    "LLM": "ernie45.engine.client",
    "SamplingParams": "ernie45.engine.request",
    "ErnieError": "ernie45.errors",
    "load_model": "ernie45.models.load",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ernie45' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Which weights learn: the stages in which a model of the family comes to see, and patterns of names for everything between.

| stage  | learns |
|---|---|
| text   | the language model; what sees stays as it is |
| sight  | the vision tower and the resampler alone: what they say comes to fit a language model that stays as it is |
| vision | the vision experts and their routers too |
| joint  | everything |

Source: ERNIE 4.5 technical report. What is frozen stays the same to the bit, and the selection biases of frozen routers with it.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from ernie45.errors import ConfigError, did_you_mean
from ernie45.models.text import Decoder

Stage = Literal["text", "sight", "vision", "joint"]
_SIGHT, _EXPERTS = "sight.*", "layers.*.ffn.vision.*"
_LEARNS: dict[Stage, tuple[str, ...]] = {"sight": (_SIGHT,), "vision": (_SIGHT, _EXPERTS)}


def choose_learning(decoder: Decoder, stage: Stage, freeze: Sequence[str] = ()) -> None:
    """Let the weights of a stage learn and freeze the others, and those whose names fit a pattern of `freeze` (`*`, `?`, `[...]`).

    Selection biases learn by load alone and never by gradient. Raises ConfigError for a stage that a text model does not have, a pattern
    that fits no name, and when nothing is left.
    """
    if decoder.sight is None and stage in _LEARNS:
        raise ConfigError(f"stage {stage} teaches a model to see, and this one reads text alone; take text or joint")
    names = [name for name, _ in decoder.named_parameters()]
    for pattern in freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = did_you_mean(pattern, names)
            raise ConfigError(f"freeze: no weight of the model is named '{pattern}'{near if near.startswith('; did') else ''}")
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(_learns(name, stage) and not any(fnmatchcase(name, pattern) for pattern in freeze))
    if not any(parameter.requires_grad for parameter in decoder.parameters()):
        raise ConfigError(f"nothing is left to learn: stage {stage} without {', '.join(freeze)}")


def _learns(name: str, stage: Stage) -> bool:
    if name.endswith("selection_bias"):
        return False
    sees = any(fnmatchcase(name, pattern) for pattern in (_SIGHT, _EXPERTS))
    if stage in _LEARNS:
        return any(fnmatchcase(name, pattern) for pattern in _LEARNS[stage])
    return stage == "joint" or not sees

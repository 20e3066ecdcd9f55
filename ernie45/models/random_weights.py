"""Checkpoints of random weights: any shape of the family as a folder, written tensor by tensor, for measuring speed and memory.

Float weights are drawn as `Decoder.initialise` draws them. Packed ones are a quantised random matrix of at most `PATTERN_ROWS` rows whose
blocks are laid down in random order: they cost the kernels what real weights cost, and the largest checkpoint needs the memory of one
layer's experts. No two rows of a vocabulary are alike, though: with a hundred tokens as good as the best one, finding it would cost more
than it does in earnest. Such a model writes noise; nothing about quality can be learned from it.
"""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ernie45.models.config import TextConfig
from ernie45.models.names import FLOAT32_ENDINGS, name_table
from ernie45.models.packed import packed_dtype, packed_entry
from ernie45.models.save import new_folder
from ernie45.models.text import Decoder, fill_initial
from ernie45.nn.layers import Embedding, Linear
from ernie45.nn.moe import Experts
from ernie45.quant.model import prepare_model, quantisable, quantise_model
from ernie45.quant.spec import AnyScheme, QuantSpec, Scheme
from ernie45.tokens.filler import filler_tokenizer
from ernie45.weights.safetensors_write import TensorSpec, check_room, write_safetensors

PATTERN_ROWS = 1024
MADE_BY = "random weights, for measuring only"
Told = Callable[[str, int, int], None]
"""Hears the name of a tensor before it is made, and the bytes done and in all."""


@torch.no_grad()
def write_random(
    config: TextConfig, folder: Path, *, spec: QuantSpec | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0, told: Told
) -> int:
    """Write a model folder with random weights and a tokenizer of made-up words; returns the bytes of all weights.

    `spec` packs what it names, everything else is stored as `dtype` (the router as float32). The same arguments give the same files.
    Raises CheckpointError when the folder is there already or the disk has too little room, `ConfigError` for a spec that does not fit.
    """
    with torch.device("meta"):
        plain = Decoder(config)
        decoder = Decoder(config)
    entry: dict[str, object] = {}
    if spec is not None:
        prepare_model(decoder.to(dtype), spec)
        entry = {"quantization_config": packed_entry(spec, MADE_BY)}
        produce = _Packed(plain, decoder, spec, dtype, seed)
        specs = [TensorSpec(name, packed_dtype(name, dtype), tuple(value.shape)) for name, value in decoder.state_dict().items()]
    else:
        shapes = {name: tuple(value.shape) for name, value in plain.state_dict().items()}
        pieces = {piece.file: piece for piece in name_table(config, "pt").save_plan(shapes)}
        kinds = {name: torch.float32 if piece.ours.endswith(FLOAT32_ENDINGS) else dtype for name, piece in pieces.items()}
        specs = [TensorSpec(name, kinds[name], piece.shape) for name, piece in pieces.items()]

        def produce(name: str) -> Tensor:
            return _drawn(name, pieces[name].ours, pieces[name].shape, kinds[name], seed)

    total, done = sum(one.nbytes for one in specs), 0
    sizes = {one.name: one.nbytes for one in specs}

    def produce_and_tell(name: str) -> Tensor:
        nonlocal done
        told(name, done, total)
        done += sizes[name]
        return produce(name)

    with new_folder(folder) as partial:
        check_room(partial, total)
        write_safetensors(partial, specs, produce_and_tell)
        body = config.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch."), "ernie45_source": MADE_BY} | entry
        files = {"config.json": body} | filler_tokenizer(config.vocab_size, bos_id=config.bos_id, eos_id=config.eos_id)
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    return total


def _generator(name: str, seed: int) -> torch.Generator:
    """Of the tensor's own, so that no tensor depends on which were made before it."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _drawn(name: str, ours: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return fill_initial(ours, torch.empty(shape, dtype=dtype), _generator(name, seed))


class _Packed:
    """Tensors of a packed model by name."""

    def __init__(self, plain: nn.Module, packed: nn.Module, spec: QuantSpec, dtype: torch.dtype, seed: int) -> None:
        self._shapes = {name: tuple(value.shape) for name, value in packed.state_dict().items()}
        self._dtype, self._seed = dtype, seed
        self._schemes = {name: (module, scheme) for name, module in quantisable(plain) if (scheme := spec.scheme_for(name)) is not None}
        self._patterns: dict[tuple[str, tuple[int, ...], AnyScheme], dict[str, Tensor]] = {}
        self._vocabularies: dict[str, dict[str, Tensor]] = {}

    def __call__(self, name: str) -> Tensor:
        owner, _, own = name.rpartition(".")
        if owner not in self._schemes or own == "bias":
            return _drawn(name, name, self._shapes[name], packed_dtype(name, self._dtype), self._seed)
        module, scheme = self._schemes[owner]
        if owner in ("embed", "head") and isinstance(scheme, Scheme) and not scheme.code:
            return self._vocabulary(owner, module, scheme)[own]
        pattern = self._pattern(module, scheme)[own]
        matrix = own.rpartition("_")[0]  # `gate_up_packed` and `gate_up_scale` take their blocks in the same order
        order = _generator(f"{owner}.{matrix}", self._seed)
        shape = self._shapes[name]
        blocks = math.prod(shape[: len(shape) - pattern.dim() + 1])  # of all experts, where there are some
        return pattern.index_select(0, torch.randint(pattern.shape[0], (blocks,), generator=order)).view(shape)

    def _pattern(self, module: nn.Module, scheme: AnyScheme) -> dict[str, Tensor]:
        """The packed tensors of a random matrix like `module`'s, of an expert stack those of one expert; blocks of rows come first."""
        key = (type(module).__name__, tuple(size for value in module.state_dict().values() for size in value.shape), scheme)
        if key not in self._patterns:
            made = self._packed(_like(module), scheme, str(key))
            self._patterns[key] = {name: value[0] if isinstance(module, Experts) else value for name, value in made.items()}
        return self._patterns[key]

    def _vocabulary(self, owner: str, module: nn.Module, scheme: Scheme) -> dict[str, Tensor]:
        """The packed tensors of an embedding or head, every row drawn for itself."""
        if owner not in self._vocabularies:
            assert isinstance(module, Linear | Embedding)
            rows, width = module.weight.shape
            starts = range(0, rows, PATTERN_ROWS)
            parts = [self._packed(Linear(width, min(rows - start, PATTERN_ROWS)), scheme, f"{owner} {start}") for start in starts]
            self._vocabularies[owner] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self._vocabularies[owner]

    def _packed(self, matrix: nn.Module, scheme: AnyScheme, label: str) -> dict[str, Tensor]:
        for name, value in matrix.state_dict().items():
            fill_initial(name, value, _generator(label + name, self._seed))
        holder = nn.ModuleDict({"matrix": matrix})
        quantise_model(holder, QuantSpec.uniform(str(scheme)))
        return dict(holder["matrix"].state_dict())


def _like(module: nn.Module) -> nn.Module:
    """A module of the same kind and width with at most `PATTERN_ROWS` rows, or one expert."""
    if isinstance(module, Experts):
        return Experts(module.down.shape[1], 1, module.down.shape[2])
    assert isinstance(module, Linear | Embedding)
    rows, width = module.weight.shape
    return Linear(width, min(rows, PATTERN_ROWS))

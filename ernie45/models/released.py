"""Every released checkpoint of the family, as data.

Sizes come from the published configuration files; the vision half of VL-424B, whose file is not public in this form, holds the only values
that match its published size. `docs/guides/models.md` shows the table.
"""

from dataclasses import dataclass

from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.vision_config import VisionConfig


@dataclass(frozen=True, kw_only=True)
class Release:
    """One published checkpoint. `stored` is how its weights are kept; `tuning` says what it was trained to be."""

    name: str
    text: TextConfig
    vision: VisionConfig | None = None
    tuning: str
    stored: str = "bf16"
    note: str = ""

    @property
    def hub_names(self) -> tuple[str, ...]:
        """Repository names on the Hub, the PyTorch layout first where there are two."""
        if self.stored != "bf16":
            return (f"baidu/{self.name}",)
        if self.name.endswith("-Thinking"):
            return (f"baidu/{self.name}",)
        return (f"baidu/{self.name}-PT", f"baidu/{self.name}-Paddle")


_VOCAB = 103_424

_SMALL = TextConfig(
    hidden_size=1024, num_layers=18, num_heads=16, num_kv_heads=2, head_size=128, ffn_size=3072, vocab_size=_VOCAB
)  # the heads together are 2048 wide, twice the hidden size


def _a3b(num_mtp: int) -> TextConfig:
    experts = ExpertsConfig(num_experts=64, top_k=6, expert_size=1536, num_shared=2, first_layer=1, last_layer=27)
    return TextConfig(
        hidden_size=2560,
        num_layers=28,
        num_heads=20,
        num_kv_heads=4,
        head_size=128,
        ffn_size=12_288,
        vocab_size=_VOCAB,
        experts=experts,
        num_mtp=num_mtp,
    )


def _a47b(num_mtp: int) -> TextConfig:
    experts = ExpertsConfig(num_experts=64, top_k=8, expert_size=3584, num_shared=0, first_layer=3, last_layer=53)
    return TextConfig(
        hidden_size=8192,
        num_layers=54,
        num_heads=64,
        num_kv_heads=8,
        head_size=128,
        ffn_size=28_672,
        vocab_size=_VOCAB,
        tie_embeddings=False,
        experts=experts,
        num_mtp=num_mtp,
    )


_VL28 = VisionConfig(expert_size=512)
_VL424 = VisionConfig(expert_size=1536)
_UNSEEN = "vision half inferred from the published size"

RELEASES: tuple[Release, ...] = (
    Release(name="ERNIE-4.5-0.3B", text=_SMALL, tuning="chat"),
    Release(name="ERNIE-4.5-0.3B-Base", text=_SMALL, tuning="base"),
    Release(name="ERNIE-4.5-21B-A3B", text=_a3b(1), tuning="chat"),
    Release(name="ERNIE-4.5-21B-A3B-Base", text=_a3b(0), tuning="base"),
    Release(name="ERNIE-4.5-21B-A3B-Thinking", text=_a3b(0), tuning="thinking", note="whether it ships the MTP block is not known"),
    Release(name="ERNIE-4.5-300B-A47B", text=_a47b(1), tuning="chat"),
    Release(name="ERNIE-4.5-300B-A47B-Base", text=_a47b(0), tuning="base"),
    Release(name="ERNIE-4.5-300B-A47B-FP8-Paddle", text=_a47b(1), tuning="chat", stored="fp8"),
    Release(name="ERNIE-4.5-300B-A47B-W4A8C8-TP4-Paddle", text=_a47b(1), tuning="chat", stored="int4, int8 KV, 4 ranks"),
    Release(name="ERNIE-4.5-300B-A47B-2Bits-Paddle", text=_a47b(1), tuning="chat", stored="2 bit"),
    Release(name="ERNIE-4.5-VL-28B-A3B", text=_a3b(0), vision=_VL28, tuning="chat"),
    Release(name="ERNIE-4.5-VL-28B-A3B-Base", text=_a3b(0), vision=_VL28, tuning="base"),
    Release(name="ERNIE-4.5-VL-28B-A3B-Thinking", text=_a3b(0), vision=_VL28, tuning="thinking"),
    Release(name="ERNIE-4.5-VL-424B-A47B", text=_a47b(0), vision=_VL424, tuning="chat", note=_UNSEEN),
    Release(name="ERNIE-4.5-VL-424B-A47B-Base", text=_a47b(0), vision=_VL424, tuning="base", note=_UNSEEN),
)
CHECKPOINTS: dict[str, Release] = {release.name: release for release in RELEASES}


def tiny(*, experts: bool = False, vocab_size: int = 512, num_mtp: int = 0) -> TextConfig:
    """A decoder of a few hundred thousand parameters that uses every part of the architecture; for tests and trials."""
    bank = ExpertsConfig(num_experts=8, top_k=2, expert_size=64, num_shared=1, first_layer=1, last_layer=3)
    return TextConfig(
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        ffn_size=128,
        vocab_size=vocab_size,
        max_positions=4096,
        experts=bank if experts else None,
        num_mtp=num_mtp,
    )

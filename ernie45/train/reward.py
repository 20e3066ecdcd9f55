"""A reward model: a decoder whose last state of an answer becomes a number, learned from pairs (Bradley-Terry).

`RewardModel.score` is what reinforcement learning asks: docs/guides/align.md has the seam. Letters: T tokens, P pairs, D width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ernie45.errors import CheckpointError
from ernie45.models.load import load_model
from ernie45.models.text import Decoder, check_tokens
from ernie45.nn.attention import BranchedCausal, PackedCausal
from ernie45.nn.layers import Linear
from ernie45.train.comparison import Compared
from ernie45.train.forward import states
from ernie45.train.preference import PreferenceBatch
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.weights.safetensors import open_safetensors
from ernie45.weights.safetensors_write import save_safetensors

HEAD, WEIGHT = "reward_head.safetensors", "score.weight"


class RewardModel(nn.Module):
    """A decoder and a head [1, D] without bias on its normed states; the reward of a text is the head's value at its last token."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        with torch.device("cpu"):
            self.score_head = Linear(decoder.config.hidden_size, 1)

    def initialise(self, generator: torch.Generator) -> "RewardModel":
        """Fill the head: normal, as small as fresh layers are."""
        with torch.no_grad():
            self.score_head.weight.normal_(0, 0.02, generator=generator)
        return self

    def values(self, h_RD: Tensor) -> Tensor:
        """Rewards of states of the decoder's last layer, float32 [R]."""
        return F.linear(self.decoder.norm(h_RD).float(), self.score_head.weight.float()).squeeze(-1)

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The reward of each text, ids of prompt and answer, float32 [R]. Raises RequestError for ids that the model does not know."""
        for row in rows:
            check_tokens(row, self.decoder.config)
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        x_TD = self.decoder.embed(torch.tensor([token for row in rows for token in row]))
        positions_T = torch.cat([torch.arange(len(row)) for row in rows])
        return self.values(self.decoder(x_TD, positions_T, PackedCausal(ends.tolist()))[ends - 1])

    def save_head(self, folder: Path) -> None:
        """Write the head beside the weights in a model folder."""
        (written,) = save_safetensors(folder / ".head", [(WEIGHT, self.score_head.weight.detach())], shard_bytes=1 << 62)
        written.rename(folder / HEAD)
        (folder / ".head").rmdir()


def load_reward_model(folder: Path, *, dtype: str = "auto") -> RewardModel:
    """The reward model in a folder that `ernie align --preference.loss reward` made. Raises CheckpointError for any other folder."""
    if not (folder / HEAD).is_file():
        raise CheckpointError(f"{folder}: has no {HEAD}, so it is no reward model; make one with `ernie align --preference.loss reward`")
    model = RewardModel(load_model(folder, dtype=dtype)).eval()
    with open_safetensors(folder / HEAD) as files:
        found = files.read(WEIGHT) if WEIGHT in files.names() else None
        if found is None or found.shape != model.score_head.weight.shape:
            raise CheckpointError(
                f"{folder / HEAD}: is not the head of this model; expected {WEIGHT} {list(model.score_head.weight.shape)}"
            )
        with torch.no_grad():
            model.score_head.weight.copy_(found)
    return model


class RewardJudge:
    """`-log sigmoid(r_chosen - r_rejected - margin x gap)`, and `center x (r_chosen + r_rejected)^2` to keep rewards near 0."""

    def __init__(self, model: RewardModel, config: PreferenceConfig, *, recompute: bool = False) -> None:
        self.model, self.config, self.recompute = model, config, recompute

    def __call__(self, batch: PreferenceBatch) -> Compared:
        """The loss of each pair, and by how much the chosen answer has more."""
        decoder = self.model.decoder
        attend = BranchedCausal([tuple(group) for group in batch.groups])
        h_TD = states(decoder, batch, attend, recompute=self.recompute)
        ends = torch.tensor([length for group in batch.groups for length in group]).cumsum(0).view(-1, 3)
        chosen_P, rejected_P = self.model.values(h_TD[(ends[:, 1:] - 1).flatten()]).view(-1, 2).unbind(1)
        apart_P = chosen_P - rejected_P
        losses_P = -F.logsigmoid(apart_P - self.config.margin * batch.gap_P)
        return Compared(losses_P + self.config.center * (chosen_P + rejected_P).square(), apart_P.detach())

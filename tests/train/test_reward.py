"""Reward models: the loss of TRL's trainer step for step, rewards that do not depend on the batch, a head that comes back."""

import warnings

import pytest
import torch

from ernie45.errors import CheckpointError, RequestError
from ernie45.models.save import save_model
from ernie45.train.comparison import ComparisonStep
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.preference import pack_pairs
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.reward import HEAD, RewardJudge, RewardModel, load_reward_model
from ernie45.weights.safetensors_write import save_safetensors
from tests.train.conftest import make_decoder
from tests.train.test_preference import make_pair
from tests.train.test_trl import RATE, STEPS, rows_of, tokenizer_of_words, trl_settings

PAIRS = [make_pair(seed, prompt=4 + seed, chosen=3 + seed, rejected=6) for seed in range(4)]


def make_model(**how):
    return RewardModel(make_decoder(**how)).initialise(torch.Generator().manual_seed(1))


class TheirModel(torch.nn.Module):
    """transformers has no scoring head for this family: its decoder, and a head on the last token, as its other families have it."""

    def __init__(self, base, head):
        super().__init__()
        self.model, self.score, self.config = base.model, torch.nn.Linear(*head.shape[::-1], bias=False), base.config
        self.score.weight.data.copy_(head)
        self.config.num_labels = 1

    def add_model_tags(self, tags):
        """TRL marks models that it has trained."""

    def forward(self, input_ids, attention_mask, **_):
        from transformers.modeling_outputs import SequenceClassifierOutput

        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return SequenceClassifierOutput(logits=self.score(states[torch.arange(len(last)), last]))


@pytest.mark.filterwarnings("default")
def test_losses_are_those_of_trl(tmp_path):
    from transformers import AutoModelForCausalLM
    from trl import RewardConfig, RewardTrainer

    save_model(make_decoder(), tmp_path / "base")
    ours = make_model()
    rows = [{"chosen_ids": [*p.prefix, *p.chosen], "rejected_ids": [*p.prefix, *p.rejected], "margin": 0.2 * p.gap} for p in PAIRS]
    settings = RewardConfig(
        **trl_settings(tmp_path / "out"),
        center_rewards_coefficient=0.05,
        per_device_train_batch_size=4,
        weight_decay=0.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RewardTrainer, "_prepare_dataset", lambda self, dataset, *rest: dataset)
            theirs = TheirModel(base, ours.score_head.weight.detach())
            trainer = RewardTrainer(theirs, settings, train_dataset=rows_of(rows), processing_class=tokenizer_of_words())
            trainer.train()
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    judge = RewardJudge(ours, PreferenceConfig(loss="reward", margin=0.2, center=0.05))
    learner = ComparisonStep(judge, Optimiser(ours, OptimiserConfig(weight_decay=0.0), 32))
    reports = [learner([pack_pairs(PAIRS)], step, RATE) for step in range(STEPS)]
    assert reports[0].loss - reports[-1].loss > 0.1
    # float32 rewards of a few units; another order of sums over a few steps of Adam
    assert [report.loss for report in reports] == pytest.approx([line["loss"] for line in logged], rel=1e-4, abs=1e-5)
    assert [report.accuracy for report in reports] == pytest.approx([line["accuracy"] for line in logged])


@pytest.mark.parametrize("experts", [False, True])
def test_a_reward_is_that_of_the_row_alone(experts):
    model = make_model(experts=experts)
    batch = pack_pairs(PAIRS)
    found = RewardJudge(model, PreferenceConfig(loss="reward"))(batch).margins
    rows = [[*p.prefix, *answer] for p in PAIRS for answer in (p.chosen, p.rejected)]
    together = model.score(rows)
    alone = torch.cat([model.score([row]) for row in rows])
    # float32, rewards around 0.2
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, alone[::2] - alone[1::2], atol=1e-6, rtol=1e-5)


def test_the_head_comes_back_with_its_model(tmp_path):
    model = make_model()
    save_model(model.decoder, tmp_path / "model")
    with pytest.raises(CheckpointError, match="is no reward model; make one"):
        load_reward_model(tmp_path / "model")
    model.save_head(tmp_path / "model")
    back = load_reward_model(tmp_path / "model")
    assert torch.equal(back.score([[5, 6, 7]]), model.score([[5, 6, 7]]))
    with pytest.raises(RequestError, match="outside the vocabulary"):
        back.score([[5, 512]])
    (written,) = save_safetensors(tmp_path / "other", [("score.weight", torch.zeros(1, 3))])
    written.replace(tmp_path / "model" / HEAD)
    with pytest.raises(CheckpointError, match="is not the head of this model"):
        load_reward_model(tmp_path / "model")

"""KTO (arXiv 2402.01306): learning from single answers that are good or bad, without pairs.

An answer is judged against how far the policy has drifted from the reference altogether. As in TRL, the drift is measured on mismatched
answers: each prompt with the answer of the example before it in its batch. Both share the prompt, so a row here is laid out like a pair's:
the prompt once, its own answer, and the mismatched one. Letters: T tokens, P answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ernie45.errors import DataError, ErnieError
from ernie45.models.text import Decoder
from ernie45.tokens.messages import Message
from ernie45.tokens.template import IGNORED, ChatTemplate
from ernie45.train.batch import KnownPicture
from ernie45.train.comparison import Compared
from ernie45.train.preference import PairExample, PreferenceBatch, Reference, look_at_prompt, pack_pairs, pair_log_probs
from ernie45.train.preference_losses import PreferenceConfig
from ernie45.train.records import Judgement, Preference, Record
from ernie45.train.sighted import Gallery


@dataclass(frozen=True)
class JudgedExample:
    """A prompt without its last token, and that token with the answer after it; labels in place, as `Prompt` has them."""

    prefix: tuple[int, ...]
    answer: tuple[int, ...]
    labels: tuple[int, ...]
    good: bool
    pictures: tuple[KnownPicture, ...] = ()
    """What placeholders in the prefix stand for, in order."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Its prompt and its answer."""
        return (*self.prefix, *self.answer)

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model: in a batch, every answer stands twice."""
        return len(self.prefix) + 2 * len(self.answer)


def as_judged(record: Record, template: ChatTemplate, gallery: Gallery | None = None) -> list[JudgedExample]:
    """The judged answer of a record, or the two of a pair; gallery: reads the pictures of prompts. Raises DataError naming the row."""
    if isinstance(record, Judgement):
        return [_judged(record, record.answer, record.good, template, gallery)]
    if isinstance(record, Preference):
        both = ((record.chosen, True), (record.rejected, False))
        return [_judged(record, answer, good, template, gallery) for answer, good in both]
    raise DataError(f"{record.where}: is no judged answer; expected prompt + completion + label, or a pair")


def _judged(
    record: Judgement | Preference, answer: tuple[Message, ...], good: bool, template: ChatTemplate, gallery: Gallery | None
) -> JudgedExample:
    prompt, pictures = look_at_prompt(record.prompt, (answer,), gallery, record.where)
    try:
        tools = record.tools or None
        opening = len(template.render(prompt, tools=tools, add_generation_prompt=True).ids)
        whole = template.render([*prompt, *answer], tools=tools, add_generation_prompt=False)
    except ErnieError as error:
        raise DataError(f"{record.where}: {error}") from None
    labels = tuple(label if place >= opening else IGNORED for place, label in enumerate(whole.labels))
    first = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
    if not first:
        raise DataError(f"{record.where}: the answer is empty, or nothing in it is learned")
    return JudgedExample(whole.ids[: first - 1], whole.ids[first - 1 :], labels[first - 1 :], good, pictures)


def pack_judged(examples: Sequence[JudgedExample], gallery: Gallery | None = None) -> PreferenceBatch:
    """Rows as of pairs: each prompt with its own answer and with that of the example before it, the first with the last one's."""
    rows = []
    for n, own in enumerate(examples):
        other = examples[n - 1]  # after the last token of this prompt, not of its own
        mismatched, labels = (own.answer[0], *other.answer[1:]), (IGNORED, *other.labels[1:])
        rows.append(PairExample(own.prefix, own.answer, mismatched, own.labels, labels, 1.0, own.pictures))
    return replace(pack_pairs(rows, gallery), good_P=torch.tensor([example.good for example in examples]))


class UnpairedJudge:
    """KTO's loss: `1 - sigmoid(beta (w - drift))` of a good answer, `1 - sigmoid(beta (drift - w))` of a bad one.

    w is the log-ratio of the answer under policy and reference, drift the mean log-ratio of the mismatched answers, at least 0 and without
    gradient.
    """

    def __init__(self, decoder: Decoder, config: PreferenceConfig, reference: Reference, *, recompute: bool = False) -> None:
        self.decoder, self.config, self.reference, self.recompute = decoder, config, reference, recompute

    def __call__(self, batch: PreferenceBatch) -> Compared:
        """The loss of each answer, and beta w with the sign that is wished for."""
        assert batch.good_P is not None, "a batch of pairs is not for KTO"
        own_P, other_P = pair_log_probs(self.decoder, batch, recompute=self.recompute)
        own0_P, other0_P = self.reference.log_probs(batch)
        ratio_P = own_P - own0_P
        several = batch.num_compared > 1  # a single answer would be measured against itself
        drift = (other_P - other0_P).detach().mean().clamp(min=0) if several else torch.zeros(())
        sign_P = torch.where(batch.good_P, 1.0, -1.0)
        weight_P = torch.where(batch.good_P, self.config.desirable, self.config.undesirable)
        losses_P = weight_P * (1 - torch.sigmoid(self.config.beta * sign_P * (ratio_P - drift)))
        return Compared(losses_P, self.config.beta * sign_P * ratio_P.detach())

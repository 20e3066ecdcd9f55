"""What a model writes while it learns: the same prompts at every checkpoint, greedily, so that they can be compared."""

import json
from collections.abc import Sequence
from pathlib import Path

from ernie45.engine.client import LLM
from ernie45.engine.request import SamplingParams
from ernie45.models.text import Decoder
from ernie45.tokens.pictures import PixelRules
from ernie45.tokens.template import ChatTemplate
from ernie45.tokens.tokenizer import Tokenizer
from ernie45.train.checkpoint import Progress

SAMPLES = "samples.jsonl"


class Samples:
    """Writes `{step, prompt, text}` lines into a run's folder. With a template prompts are questions, without one they are continued."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        folder: Path,
        prompts: Sequence[str],
        tokens: int,
        rules: PixelRules | None = None,
    ) -> None:
        """Raises RequestError for a prompt that does not fit the model. tokens: most of an answer; rules: of a model that sees."""
        self.path, self.prompts, self.chats = folder / SAMPLES, prompts, template is not None
        self._params = SamplingParams(max_tokens=tokens, temperature=0.0)
        self._parts, self._rules = (decoder, tokenizer, template), rules

    def __call__(self, progress: Progress) -> None:
        """Take the samples of one checkpoint. The engine lives only as long, so that its cache is not held while the model learns."""
        if not self.prompts:
            return
        decoder, tokenizer, template = self._parts
        learning = decoder.training
        decoder.eval()
        try:
            llm = LLM(decoder, tokenizer=tokenizer, template=template, rules=self._rules)
            answers = (
                [llm.chat(prompt, self._params) for prompt in self.prompts] if self.chats else llm.generate(self.prompts, self._params)
            )
        finally:
            decoder.train(learning)
        rows = [
            {"step": progress.step, "prompt": prompt, "text": answer.text} for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

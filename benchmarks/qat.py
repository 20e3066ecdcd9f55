"""Held-out loss of a model rounded to nearest, trained and then rounded, and trained through the rounding: the same steps on the same text.

    python benchmarks/qat.py [--model starter] [--scheme w4a8-g64-h] [--steps 16] [--tokens 512] [--threads 1]

The text is Python's help topics, as `ernie quantize` has it: three quarters to learn from, the other to measure on.
"""

import argparse
import copy

import torch

from ernie45.config import Environment
from ernie45.models.load import find_model, load_model
from ernie45.models.text import Decoder
from ernie45.quant.model import quantise_model
from ernie45.quant.qat import pack_trained, prepare_training
from ernie45.quant.spec import QuantSpec, Rule
from ernie45.recipes.texts import built_in_text, spread_windows
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.train.batch import Example, pack
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.step import LossConfig, Step


def learn(decoder: Decoder, windows: list[list[int]], steps: int, peak: float) -> None:
    """One window a step, the rate falling to 0 along a line."""
    step = Step(decoder.train(), Optimiser(decoder, OptimiserConfig(weight_decay=0.0), decoder.config.head_size), LossConfig())
    for n in range(steps):
        ids = tuple(windows[n % len(windows)])
        report = step([pack([Example(ids, ids)])], n, peak * (steps - n) / steps)
        print(f"  step {n}: loss {report.loss:.4f}, {report.seconds:.1f} s", flush=True)
    step.watch.close()


@torch.no_grad()
def held_out_loss(decoder: Decoder, windows: list[list[int]]) -> float:
    """Mean loss of the tokens after the first of each window."""
    decoder.eval()
    rows = [torch.nn.functional.cross_entropy(decoder.prompt_logits(ids)[:-1], torch.tensor(ids[1:])) for ids in windows]
    return torch.stack(rows).mean().item()


def main() -> None:
    """Print a line for each of the four models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--scheme", default="w4a8-g64-h")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--peak", type=float, default=5e-5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = find_model(args.model, Environment.read())
    tokenizer = load_tokenizer(folder)
    texts = [
        spread_windows(tokenizer, built_in_text(held_out=h), 4096 if h else args.steps * args.tokens, args.tokens, "text") for h in (0, 1)
    ]
    base = load_model(folder, dtype="float32", mapped=False)
    rules = (Rule(pattern="embed" if base.head is None else "head", scheme="w8a8-g64-h"), Rule(pattern="*", scheme=args.scheme))
    spec = QuantSpec(rules=rules)

    def show(name: str, decoder: Decoder) -> None:
        print(f"{name}: {held_out_loss(decoder, texts[1]):.4f}", flush=True)

    show("floats", base)
    rounded = copy.deepcopy(base)
    quantise_model(rounded, spec)
    show("rounded to nearest", rounded)
    del rounded
    learner = copy.deepcopy(base)
    learn(learner, texts[0], args.steps, args.peak)
    show("trained in floats", learner)
    quantise_model(learner, spec)
    show("trained in floats, then rounded to nearest", learner)
    del learner
    prepare_training(base, spec)
    learn(base, texts[0], args.steps, args.peak)
    pack_trained(base)
    show("trained through the rounding, packed", base)


if __name__ == "__main__":
    main()

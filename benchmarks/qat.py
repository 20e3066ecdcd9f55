"""Held-out loss of a model rounded to nearest, trained and then rounded, and trained through the rounding: the same steps on the same text.

    python benchmarks/qat.py [--model starter] [--scheme w4a8-g64-h] [--learn scales] [--minutes 4] [--tokens 256] [--threads 2]

Losses are compared window by window: a difference is told with its standard error over the held-out windows.
The text is Python's help topics, as `ernie quantize` has it: three quarters to learn from, the other to measure on. `--learn scales` trains
norms and scales alone (and norms alone where there are no scales), without optimiser state for the weights; `all` trains everything. The
first training ends after `--minutes` and the second has its steps, so that the default is to take less than ten minutes on a quiet machine
of two cores.
"""

import argparse
import copy

import torch
from torch import Tensor

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


def learn(decoder: Decoder, windows: list[list[int]], args: argparse.Namespace, steps: int | None = None) -> int:
    """One window a step, the rate falling to 0 along a line; as many steps as `--minutes` allow, by the second's time. Returns how many."""
    scales_alone = args.learn == "scales"
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name.endswith((".log_scale", "norm.weight")) if scales_alone else parameter.requires_grad)
    step = Step(decoder.train(), Optimiser(decoder, OptimiserConfig(weight_decay=0.0), decoder.config.head_size), LossConfig())
    peak, total, n = args.peak or (1e-3 if scales_alone else 5e-5), steps or args.steps, 0
    while n < total:
        ids = tuple(windows[n % len(windows)])
        report = step([pack([Example(ids, ids)])], n, peak * (total - n) / total)
        print(f"  step {n}: loss {report.loss:.4f}, {report.seconds:.1f} s", flush=True)
        if n == 1 and steps is None:
            total = max(2, min(total, round(args.minutes * 60 / report.seconds)))
        n += 1
    step.watch.close()
    return total


@torch.no_grad()
def held_out_losses(decoder: Decoder, windows: list[list[int]]) -> Tensor:
    """The mean loss of the tokens after the first of each window, float64 [windows]."""
    decoder.eval()
    rows = [torch.nn.functional.cross_entropy(decoder.prompt_logits(ids)[:-1], torch.tensor(ids[1:])) for ids in windows]
    return torch.stack(rows).double()


def mean_text(values: Tensor) -> str:
    """Mean and standard error."""
    return f"{values.mean():+.4f} +- {values.std() / len(values) ** 0.5:.4f}"


def main() -> None:
    """Print a line for each of the four models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--scheme", default="w4a8-g64-h")
    parser.add_argument("--learn", choices=["scales", "all"], default="scales")
    parser.add_argument("--minutes", type=float, default=4.0, help="of the first of the two trainings")
    parser.add_argument("--steps", type=int, default=300, help="at most")
    parser.add_argument("--tokens", type=int, default=256, help="of a window; one is learned from in each step")
    parser.add_argument("--held-out", type=int, default=4096, help="tokens to measure on")
    parser.add_argument("--peak", type=float, help="learning rate; by default 1e-3 for scales and 5e-5 for all")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = find_model(args.model, Environment.read())
    tokenizer = load_tokenizer(folder)
    counts = {0: args.steps * args.tokens, 1: args.held_out}
    texts = [spread_windows(tokenizer, built_in_text(held_out=bool(h)), counts[h], args.tokens, "text") for h in (0, 1)]
    base = load_model(folder, dtype="float32", mapped=False)
    rules = (Rule(pattern="embed" if base.head is None else "head", scheme="w8a8-g64-h"), Rule(pattern="*", scheme=args.scheme))
    spec = QuantSpec(rules=rules)

    found: dict[str, Tensor] = {}

    def show(name: str, decoder: Decoder) -> None:
        found[name] = held_out_losses(decoder, texts[1])
        against = [f"{mean_text(found[name] - others)} against {other}" for other, others in found.items() if other != name]
        print(f"{name}: {found[name].mean():.4f}", *against, sep="\n    ", flush=True)

    show("floats", base)
    rounded = copy.deepcopy(base)
    quantise_model(rounded, spec)
    show("rounded to nearest", rounded)
    del rounded
    through = copy.deepcopy(base)
    prepare_training(through, spec)
    steps = learn(through, texts[0], args)
    pack_trained(through)
    show("trained through the rounding, packed", through)
    del through
    learn(base, texts[0], args, steps)
    show("trained in floats", base)
    quantise_model(base, spec)
    show("trained in floats, then rounded to nearest", base)


if __name__ == "__main__":
    main()

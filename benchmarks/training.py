"""Training speed and memory beside TRL + PEFT and transformers: the same model, rows, settings and threads, each in a process of its own.

    python benchmarks/training.py [--method lora|full|dpo|moe] [--model starter] [--data rows.jsonl] [--steps 4] [--dtype bfloat16]

Without --data the rows are random ids, for folders without a tokenizer. `dpo` has random pairs whose prompt is half of a row, all weights
learn, and tokens are counted as of two whole rows on both sides: here the prompt is computed once. `--dtype bfloat16` computes in bfloat16
on both sides: here with float32 masters in the optimiser, there as `model.to(bfloat16)` without; `--autocast` is TRL's own `bf16`, which
casts float32 weights in every product. `--state bfloat16` holds our two means in bfloat16, as TRL's are where the model is. `moe` is a step
of pre-training of a small mixture of experts (212 M parameters, 58 M for a token, random; `--model` is not asked) beside transformers' own
model class with torch's fused AdamW. `--clock cpu` counts processor time, for machines that others use too. Needs trl and peft. Losses are
printed beside the speed: a faster run that learns something else is no faster run.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

RATE, TOKENS = 1e-4, 1024
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def small_mixture(folder: Path) -> str:
    """The folder of a random mixture of experts, made when it is not there: 8 layers of width 512, 32 experts of which a token takes 4."""
    import torch

    from ernie45.models.config import ExpertsConfig, TextConfig
    from ernie45.models.save import save_model
    from ernie45.models.text import Decoder

    experts = ExpertsConfig(num_experts=32, top_k=4, expert_size=512, num_shared=2, first_layer=1, last_layer=7)
    config = TextConfig(
        hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=2, head_size=64, ffn_size=2048, vocab_size=32000, experts=experts
    )
    if not folder.exists():
        save_model(Decoder(config).initialise(torch.Generator().manual_seed(0)), folder)
    return str(folder)


def load_rows(model: str, data: Path | None, count: int, length: int) -> tuple[Path, list]:
    """The model folder, and the rows as examples of at most TOKENS tokens; `count` random ones of `length` without `data`."""
    import torch

    from ernie45.config import Environment
    from ernie45.models.load import find_model
    from ernie45.tokens.template import load_template
    from ernie45.tokens.tokenizer import load_tokenizer
    from ernie45.train.batch import Example
    from ernie45.train.examples import make_examples
    from ernie45.train.records import read_records

    folder = find_model(model, Environment.read())
    if data is None:
        ids = torch.randint(10, 30000, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
        return folder, [Example(tuple(row), tuple(row)) for row in ids]
    tokenizer = load_tokenizer(folder)
    examples = make_examples(read_records([data]), load_template(folder, tokenizer), tokenizer, TOKENS, on_bad=lambda error: None)
    return folder, examples


def random_pairs(args: argparse.Namespace) -> list:
    """A pair for each row: a prompt of half the length, and two answers that fill it."""
    import torch

    from ernie45.tokens.template import IGNORED
    from ernie45.train.preference import PairExample

    generator, half = torch.Generator().manual_seed(0), args.length // 2
    pairs = []
    for _ in range(args.rows * args.steps):
        ids = torch.randint(10, 30000, (3, half), generator=generator).tolist()
        chosen, rejected = ((ids[0][-1], *answer) for answer in ids[1:])
        pairs.append(PairExample(tuple(ids[0][:-1]), chosen, rejected, (IGNORED, *chosen[1:]), (IGNORED, *rejected[1:]), 1.0))
    return pairs


def run_ours(args: argparse.Namespace) -> dict:
    """So many rows a step, packed."""
    from contextlib import nullcontext

    import torch

    from ernie45.models.load import load_model
    from ernie45.nn.lora import LoraConfig, adapt
    from ernie45.train.batch import pack
    from ernie45.train.comparison import ComparisonStep
    from ernie45.train.optim import Optimiser, OptimiserConfig
    from ernie45.train.preference import PairJudge, Reference, pack_pairs
    from ernie45.train.preference_losses import PreferenceConfig
    from ernie45.train.step import LossConfig, Step

    torch.set_num_threads(args.threads)
    folder, examples = load_rows(args.model, args.data, args.rows * args.steps, args.length)
    decoder = load_model(folder, dtype=args.dtype).train()
    if args.method == "lora":
        adapt(decoder.requires_grad_(False).layers, LoraConfig(rank=8), torch.Generator().manual_seed(0))
    optimiser = Optimiser(decoder, OptimiserConfig(weight_decay=0.0, state=args.state), decoder.config.head_size)
    if args.method == "dpo":
        examples = random_pairs(args)
        frozen = load_model(folder, dtype=args.dtype).eval().requires_grad_(False)
        judge = PairJudge(decoder, PreferenceConfig(), Reference(frozen, nullcontext), recompute=args.recompute)
        learner = ComparisonStep(judge, optimiser)
    else:
        learner = Step(decoder, optimiser, LossConfig(), recompute=args.recompute)
    reports, ends = [], []
    for step in range(args.steps):
        rows = examples[args.rows * step : args.rows * (step + 1)]
        reports.append(learner([pack_pairs(rows) if args.method == "dpo" else pack(rows)], step, RATE))
        ends.append(CLOCKS[args.clock]())
    seconds = ends[-1] - ends[0]
    tokens = 2 * args.rows * args.length * (args.steps - 1) if args.method == "dpo" else sum(r.tokens for r in reports[1:])
    return {"tokens_per_s": tokens / seconds, "losses": [r.loss for r in reports]}


def run_trl(args: argparse.Namespace) -> dict:
    """So many rows a step, padded, by TRL's SFTTrainer."""
    import torch
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from peft import LoraConfig
    from pyarrow import Table
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Notes when each step ends."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: object, **__: object) -> None:
            self.ends.append(CLOCKS[args.clock]())

    torch.set_num_threads(args.threads)
    folder, examples = load_rows(args.model, args.data, args.rows * args.steps, args.length)
    common = {
        "output_dir": str(Path(args.scratch)),
        "per_device_train_batch_size": args.rows,
        "max_steps": args.steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": args.autocast,
        "activation_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM") if args.method == "lora" else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))  # the rows hold ids already, but TRL asks for a tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="b", unk_token="a")
    clock = Clock()

    def rows_of(rows: list[dict]) -> Dataset:
        return Dataset(InMemoryTable(Table.from_pylist(rows)), fingerprint="rows")

    if args.method == "dpo":
        rows = [
            {"prompt_ids": [*p.prefix, p.chosen[0]], "chosen_ids": list(p.chosen[1:]), "rejected_ids": list(p.rejected[1:])}
            for p in random_pairs(args)
        ]
        frozen = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
        DPOTrainer._prepare_dataset = lambda self, dataset, *rest: dataset  # the rows hold ids already
        trainer = DPOTrainer(model, frozen, DPOConfig(**common), train_dataset=rows_of(rows), processing_class=tokenizer, callbacks=[clock])
        tokens = 2 * args.rows * args.length * (args.steps - 1)
    else:
        examples = examples[: args.rows * args.steps]
        rows = [{"input_ids": list(e.ids), "labels": list(e.labels)} for e in examples]
        settings = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = SFTTrainer(model, settings, train_dataset=rows_of(rows), processing_class=tokenizer, peft_config=lora, callbacks=[clock])
        tokens = sum(len(e.ids) for e in examples[args.rows :])  # without padding: the same tokens on both sides
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "grad_norm" in line]
    return {"tokens_per_s": tokens / (clock.ends[-1] - clock.ends[0]), "losses": [float(loss) for loss in losses]}


def run_transformers(args: argparse.Namespace) -> dict:
    """So many rows a step by transformers' model and a loop of a few lines: what a person writes who has no trainer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    folder, examples = load_rows(args.model, args.data, args.rows * args.steps, args.length)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses, ends = [], []
    for step in range(args.steps):
        ids = torch.tensor([example.ids for example in examples[args.rows * step : args.rows * (step + 1)]])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        ends.append(CLOCKS[args.clock]())
    return {"tokens_per_s": args.rows * args.length * (args.steps - 1) / (ends[-1] - ends[0]), "losses": losses}


def main() -> None:
    """Run both sides and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["lora", "full", "dpo", "moe"], default="lora")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a random row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--state", choices=["float32", "bfloat16"], default="float32", help="type of our optimiser's means")
    parser.add_argument("--recompute", action="store_true", help="of our layers keep the input alone, and compute them again in backward")
    parser.add_argument("--autocast", action="store_true", help="TRL's own bf16 setting, over the weights' dtype")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time of the process")
    parser.add_argument("--scratch", default="benchmarks/results/trl")
    parser.add_argument("--side", choices=["ours", "trl", "transformers"])
    args = parser.parse_args()
    peer = "transformers" if args.method == "moe" else "trl"
    if args.method == "moe":
        args.model = small_mixture(Path(args.scratch).parent / "checkpoints" / "small-mixture")
    if args.side:
        result = {"ours": run_ours, "trl": run_trl, "transformers": run_transformers}[args.side](args)
        result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(result))
        return
    print("| side | tokens/s after the first step | peak GB | losses |\n|---|---|---|---|")
    for side in ("ours", peer):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        result = json.loads(done.stdout.splitlines()[-1])
        losses = ", ".join(f"{loss:.6f}" for loss in result["losses"])
        print(f"| {side} | {result['tokens_per_s']:.0f} | {result['peak_gb']:.2f} | {losses} |", flush=True)


if __name__ == "__main__":
    main()

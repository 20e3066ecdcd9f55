"""One engine, one process: load a checkpoint, read prompts of 512 tokens, write 64 tokens greedily; prints one JSON line.

python benchmarks/peer.py ernie45|transformers FOLDER DTYPE BATCH[,BATCH...] [--prompt 512] [--output 64] [--repeats 3] [--threads 2]
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Protocol

import torch


class Peer(Protocol):
    """An engine under the stopwatch."""

    version: str

    def run(self, prompts: list[list[int]], output: int) -> tuple[float, float]:
        """Seconds until every prompt has its first token, and seconds for the `output` tokens after it."""
        ...


class Ernie45:
    """This project, as `ernie bench latency` times it, in the steps that `LLM` takes by default."""

    def __init__(self, folder: Path, dtype: str, batch: int) -> None:
        from ernie45 import __version__
        from ernie45.models.load import load_model

        self.version = __version__
        self.decoder = load_model(folder, dtype=dtype, compact=True)  # as `LLM` and the server load

    def run(self, prompts: list[list[int]], output: int) -> tuple[float, float]:
        from ernie45.recipes.bench.latency import time_run

        timing = time_run(self.decoder, prompts, output)
        return timing.first_token_s, timing.decode_s


class Transformers:
    """transformers with its own cache and SDPA attention, driven by the tightest loop it allows (faster than its `generate`)."""

    def __init__(self, folder: Path, dtype: str, batch: int) -> None:
        import transformers

        self.version = transformers.__version__
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], output: int) -> tuple[float, float]:
        start = time.perf_counter()
        out = self.model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        first = time.perf_counter()
        for _ in range(output):
            out = self.model(token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return first - start, time.perf_counter() - first


PEERS = {"ernie45": Ernie45, "transformers": Transformers}


def main() -> None:
    """Time one peer and print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("batch", type=int)
    for name, default in (("prompt", 512), ("output", 64), ("repeats", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vocabulary = json.loads((args.folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, vocabulary, (args.batch, args.prompt), generator=generator).tolist()
    start = time.perf_counter()
    peer = PEERS[args.peer](args.folder, args.dtype, args.batch)
    load = time.perf_counter() - start
    loaded = _peak_mb()
    peer.run([prompt[:16] for prompt in prompts], 4)
    runs = [peer.run(prompts, args.output) for _ in range(args.repeats)]
    print(
        json.dumps(
            {
                "peer": args.peer,
                "version": peer.version,
                "dtype": args.dtype,
                "batch": args.batch,
                "prefill_tokens_per_s": args.batch * args.prompt / statistics.median(r[0] for r in runs),
                "decode_tokens_per_s": args.batch * args.output / statistics.median(r[1] for r in runs),
                "load_s": load,
                "peak_mb_loaded": loaded,
                "peak_mb": _peak_mb(),
            }
        )
    )


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

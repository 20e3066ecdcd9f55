"""Which cores a model computes on, with how many threads, and in which pages its weights lie: chosen once, in the open.

crew = Crew(ThreadSettings())
crew.before_loading(bytes)              # memory nodes
seating = crew.after_loading(decoder)   # number of threads, each on its core, huge pages
"""

import contextlib
import ctypes
import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie45 import ops
from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.request import Request, SamplingParams
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.machine import Topology, ask_huge_pages, huge_pages_allowed, keep_to, place_memory, read_topology
from ernie45.models.text import Decoder

_SECONDS = 1.0  # of probing
_PROMPT, _ANSWER = 32, 3  # tokens of a trial
_BUSY = 0.15  # of the usable cores' time, taken by others: then a measurement says nothing
_EQUAL = 0.03  # within which more threads win: they read prompts faster
_MOST_KEPT = 200  # choices in the file
_LARGE = 8 << 20  # bytes of a tensor that is worth huge pages


@dataclass(frozen=True)
class Seating:
    """What was chosen: threads, the processors they were put on (none: the system's own choice), and why, for people."""

    threads: int
    cpus: tuple[int, ...]
    reason: str
    nodes: str
    pages: str

    def text(self) -> str:
        """One line."""
        where = f"pinned to core{'s' if len(self.cpus) > 1 else ''} {', '.join(map(str, self.cpus))}" if self.cpus else "not pinned"
        return "; ".join(part for part in (f"{self.threads} ({self.reason}), {where}", self.nodes, self.pages) if part)


class Crew:
    """Chooses and seats the threads of one process; the calling thread is one of them."""

    def __init__(self, settings: ThreadSettings, *, topology: Topology | None = None, cache: Path | None = None) -> None:
        """cache: a folder in which measured choices are kept."""
        self._settings, self._cache = settings, cache
        self._topology = topology or read_topology()
        self._cores = self._topology.cores
        self._nodes = "one memory node"

    def before_loading(self, needed: int) -> None:
        """Chooses memory nodes for so many bytes: one whose free memory holds them, else all in turn. Before weights are read."""
        nodes = sorted({core.node for core in self._topology.cores})
        if len(nodes) < 2:
            return
        self._cores = self._topology.seats(needed)
        chosen = sorted({core.node for core in self._cores})
        done = place_memory(chosen)
        if len(chosen) == 1:
            keep_to(cpu for core in self._cores for cpu in core.cpus)  # who reads the weights touches them first
            self._nodes = f"memory node {chosen[0]} of {len(nodes)}, where it fits"
        else:
            self._nodes = f"memory of {len(nodes)} nodes in turn" if done else f"{len(nodes)} memory nodes, as the system places it"

    def after_loading(self, decoder: Decoder, name: str = "") -> Seating:
        """Fixes the number of threads, by measuring where that is asked for, and puts them in place. name: the model's, for the cache."""
        threads, reason = self._count(decoder, name)
        torch.set_num_threads(threads)
        pages = self._huge_pages(decoder)
        cpus = tuple(core.cpus[0] for core in self._cores[:threads])
        wanted = self._settings.pin == "on" and len(cpus) == threads
        pinned = wanted and pin_pool(cpus)
        if self._settings.pin == "on" and not pinned:
            reason += "; pinning is not possible here"
        return Seating(threads, cpus if pinned else (), reason, self._nodes, pages)

    def _count(self, decoder: Decoder, name: str) -> tuple[int, str]:
        asked = self._settings.threads
        if isinstance(asked, int):
            return asked, "as asked"
        # OMP_NUM_THREADS may say less than there are cores
        most = max(1, min(torch.get_num_threads(), len(self._cores), self._topology.usable))
        rule = f"{most} usable core{'s' if most > 1 else ''}"
        if most == 1:
            return 1, rule
        kept = Kept(self._cache, decoder, name, most)
        if asked == "auto" and (known := kept.read()) is not None:
            return known, f"measured at an earlier start, of {most} cores"
        found = measure_threads(decoder, most)
        if found.threads is None:
            return most, f"{rule}; not measured: {found.reason}"
        kept.write(found.threads)
        return found.threads, found.reason

    def _huge_pages(self, decoder: Decoder) -> str:
        if self._settings.huge_pages != "on":
            return ""
        if not huge_pages_allowed():
            return "huge pages are not allowed on this system"
        tensors = {t.data_ptr(): t.nbytes for t in decoder.state_dict().values() if t.nbytes >= _LARGE}
        return (
            f"huge pages asked for {sum(ask_huge_pages(at, size, filled=True) for at, size in tensors.items()) / 2**20:,.0f} MiB of weights"
        )


class Kept:
    """Measured choices by model and machine, in one small file. A file that cannot be read or written is done without."""

    def __init__(self, folder: Path | None, decoder: Decoder, name: str, most: int) -> None:
        size = sum(tensor.nbytes for tensor in decoder.state_dict().values())
        machine = (os.uname().nodename, ops.describe(), torch.__version__)
        told = json.dumps([name, size, str(decoder.dtype), most, *machine])
        self._key = hashlib.sha256(told.encode()).hexdigest()[:24]
        self._most = most
        self._path = None if folder is None or not name else folder / "threads.json"

    def read(self) -> int | None:
        """The choice that was made, None without one."""
        count = self._all().get(self._key)
        return count if isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= self._most else None

    def write(self, count: int) -> None:
        """Keeps a choice."""
        if self._path is None:
            return
        made = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            others = [(key, value) for key, value in self._all().items() if key != self._key][-_MOST_KEPT:]
            made.write_text(json.dumps(dict(others) | {self._key: count}), encoding="utf-8")
            made.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                made.unlink()

    def _all(self) -> dict[str, object]:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8")) if self._path else {}
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}


@dataclass(frozen=True)
class Measured:
    """A number of threads and the times that speak for it; without a number, why there was no telling."""

    threads: int | None
    reason: str


def measure_threads(decoder: Decoder, most: int, seconds: float = _SECONDS) -> Measured:
    """The number of threads, up to `most`, that is best at reading a short prompt and at writing.

    All of the cores, half, a quarter, and one fewer than all, in turn, for about `seconds`: a neighbour or a memory that is used up
    can make fewer the better choice.
    """
    counts = sorted({most, most - 1, most // 2, most // 4} - {0}, reverse=True)
    took: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    torch.set_num_threads(most)
    slow = Measured(None, f"a trial of each number of threads takes more than {2 * seconds:g} s")
    _trial(decoder)  # to warm up: first calls take long
    began = time.perf_counter()
    _trial(decoder)
    now = time.perf_counter()
    end = now + seconds
    if (now - began) * len(counts) > 2 * seconds:
        return slow
    busy = _OthersTime()
    while not took[counts[-1]] or time.perf_counter() < end:
        for count in counts:
            torch.set_num_threads(count)
            took[count].append(_trial(decoder))
            if time.perf_counter() > end + seconds:
                return slow
    if busy.share() > _BUSY * most:
        return Measured(None, "other work keeps the cores busy")
    best = {count: tuple(min(trial[part] for trial in trials) for part in (0, 1)) for count, trials in took.items()}
    least = tuple(min(times[part] for times in best.values()) for part in (0, 1))
    costs = {count: times[0] / least[0] + times[1] / least[1] for count, times in best.items()}
    chosen = max(count for count, cost in costs.items() if cost <= min(costs.values()) * (1 + _EQUAL))
    told = ", ".join(f"{count}: {1000 * times[1]:.1f} ms a token" for count, times in best.items())
    return Measured(chosen, f"measured, {told}")


def _trial(decoder: Decoder) -> tuple[float, float]:
    """Seconds to read a short prompt, and to write one token."""
    engine = Engine(decoder, EngineConfig(max_running=1, max_length=_PROMPT + _ANSWER + 1, prefix_sharing=False))
    params = SamplingParams(temperature=0.0, max_tokens=_ANSWER + 1, ignore_eos=True)
    words = decoder.words()
    prompt = tuple(words[i % len(words)] for i in range(_PROMPT))
    engine.submit(Request(id="probe", prompt=prompt, params=params, eos_ids=()))
    began = time.perf_counter()
    engine.step()
    read = time.perf_counter()
    while not engine.idle:
        engine.step()
    return read - began, (time.perf_counter() - read) / _ANSWER


class _OthersTime:
    """How many processors' time others take, since it was made; 0 where the system does not say."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.perf_counter(), self._all_busy(), time.process_time()

    def share(self) -> float:
        seconds = time.perf_counter() - self._began
        others = self._all_busy() - self._busy - (time.process_time() - self._own)
        return max(0.0, others) / max(seconds, 1e-9)

    @staticmethod
    def _all_busy() -> float:
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0
        user, nice, system, _idle, _wait, *rest = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
        return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def pin_pool(cpus: Sequence[int]) -> bool:
    """Puts thread number i of torch's pool on processor cpus[i], the calling thread being number 0; False where that cannot be done.

    The pool is asked from inside: each of its threads calls back and says who it is, whether it was started before or is new.
    """
    found = pool_threads()
    return len(found) == len(cpus) and all(keep_to((cpu,), (thread,)) for thread, cpu in zip(found, cpus, strict=True))


def pool_threads() -> list[int]:
    """The system's numbers of torch's threads, in the pool's order; empty where torch's OpenMP does not let itself be asked."""
    library = _openmp()
    if library is None:
        return []
    numbers: dict[int, int] = {}
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def tell(_: object) -> None:
        numbers[library.omp_get_thread_num()] = threading.get_native_id()

    body = kind(tell)
    library.GOMP_parallel(body, None, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))
    return [numbers[number] for number in sorted(numbers)]


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, which lies beside torch's own."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if line.count("/")}
    mine = [path for path in sorted(loaded) if "omp" in Path(path).name and str(Path(torch.__file__).parent) in path]
    others = [path for path in sorted(loaded) if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]
    for path in mine + others:
        library = ctypes.CDLL(path)
        if hasattr(library, "GOMP_parallel"):
            return library
    return None

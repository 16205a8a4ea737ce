"""How fast is the memory manager itself, and does the size of the pool matter?

Fills pools of 10^3 to 10^7 blocks with cached prompts, then times the operations that a serving loop makes: admit a
prompt and name its blocks, admit one whose prefix is cached, append a token to each of 256 running sequences, fork,
free, evict. One Python thread, no GPU. Aims: 20 M tokens/s admitted, 20 M tokens/s of cached prefixes, 20 M
sequence-steps/s, and a cost that does not grow with the pool.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    save_figure,
)
from cupaged.memory.manager import BlockManager
from cupaged.memory.prefix_cache import chain

AIM = 20e6
NANO_VLLM = {"admit": 4.3e6, "take cached prefix": 24e3, "append": 1.35e6}
"""Tokens, tokens and sequence-steps a second of nano-vllm's BlockManager, measured on a machine of the same kind."""


@dataclass(frozen=True)
class Config:
    """What is measured."""

    block_counts: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6, 10**7)
    block_size: int = 16
    prompt_tokens: int = 2048
    batch: int = 256
    repeats: int = 60


CONFIGS = {("cpu", False): Config(), ("cpu", True): Config(block_counts=(10**3, 10**4), repeats=3)}
COLUMNS = {
    "num_blocks": "blocks|,", "operation": "operation", "per_second": "a second (median)|,.0f", "unit": "unit",
    "per_second_best": "a second (best)|,.0f", "us_per_call": "us a call|.1f",
}  # fmt: skip


class Prompts:
    """Prompts that differ in every block, each made in a microsecond from its number."""

    def __init__(self, num_tokens: int) -> None:
        self._base = np.random.default_rng(0).integers(0, 30_000, num_tokens, dtype=np.int32)

    def __getitem__(self, number: int) -> np.ndarray:
        """Return a prompt, int32 [num_tokens]."""
        return self._base + np.int32(number)


def seconds(work: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Workload:
    """A manager whose pool is full of cached prompts, and the operations to time on it."""

    def __init__(self, config: Config, num_blocks: int) -> None:
        self.config = config
        self.prompts = Prompts(config.prompt_tokens)
        self.blocks_a_prompt = config.prompt_tokens // config.block_size
        self.manager = BlockManager(num_blocks, block_size=config.block_size, max_blocks_per_seq=256)
        self.random = np.random.default_rng(1)
        self.newest = 0
        """Number of the prompt admitted last; the pool caches those before it, as many as fit."""
        self.fillers = 0
        for _ in tqdm(range(num_blocks // self.blocks_a_prompt + 2), f"fill {num_blocks:,} blocks", leave=False):
            self.admit()
            self.manager.free(self.newest)

    def admit(self) -> None:
        """Admit a new prompt under its number."""
        self.newest += 1
        self.manager.allocate(self.newest, self.prompts[self.newest])

    def measure(self) -> Iterator[tuple[str, str, int, list[float]]]:
        """Yield each operation with its unit, the units in one timing, and the timings in seconds.

        The operations take turns, so that a spell in which the machine is slow does not fall on one of them.
        """
        tokens, blocks = self.config.prompt_tokens, self.blocks_a_prompt
        operations = (
            ("hash alone", "tokens", tokens, self.time_hash),
            ("admit", "tokens", tokens, self.time_admit),
            ("admit, evicting", "tokens", tokens, self.time_admit_evicting),
            ("take cached prefix", "tokens", tokens, self.time_cached),
            ("append", "sequence-steps", self.config.batch * self.config.block_size, self.time_append_batch),
            ("append, one call each", "sequence-steps", 64, self.time_append),
            ("fork", "blocks", blocks, self.time_fork),
            ("free", "blocks", blocks, self.time_free),
            ("evict", "blocks", blocks, self.time_evict),
        )
        rounds = [[self.on_a_full_pool(timing) for *_, timing in operations] for _ in range(self.config.repeats + 1)]
        for (operation, unit, count, _), timings in zip(operations, zip(*rounds[1:], strict=True), strict=True):
            yield operation, unit, count, list(timings)

    def on_a_full_pool(self, timing: Callable[[], float]) -> float:
        """Return a timing that begins with cached content in every block."""
        while self.manager.gpu.num_free:
            self.fillers += 1
            room = self.manager.gpu.num_free * self.config.block_size
            self.manager.allocate("filler", self.prompts[-self.fillers][:room])
            self.manager.free("filler")
        return timing()

    def time_hash(self) -> float:
        prompt = self.prompts[0]
        return seconds(lambda: chain(b"", prompt, self.config.block_size))

    def time_admit(self) -> float:
        """Admit onto free blocks, as a background evictor keeps them."""
        self.manager.evict(max(0, self.blocks_a_prompt - self.manager.gpu.num_free))
        return self.time_admit_evicting()

    def time_admit_evicting(self) -> float:
        """Admit with whatever is free, which is nothing on a full pool."""
        self.newest += 1
        prompt = self.prompts[self.newest]
        spent = seconds(lambda: self.manager.allocate(self.newest, prompt))
        self.manager.free(self.newest)
        return spent

    def time_cached(self) -> float:
        """Admit a prompt that was cached some time ago: its blocks lie anywhere in the pool."""
        cached = self.manager.gpu.num_blocks // self.blocks_a_prompt
        prompt = self.prompts[self.newest - int(self.random.integers(max(1, cached // 2 - 10)))]
        spent = seconds(lambda: self.manager.allocate("probe", prompt))
        assert self.manager.cached_tokens("probe") == self.config.prompt_tokens - self.config.block_size
        self.manager.free("probe")
        return spent

    def time_append_batch(self) -> float:
        """Take block_size steps of a batch whose sequences fill their blocks at different times."""
        names = [("running", i) for i in range(self.config.batch)]
        for i, name in enumerate(names):
            self.manager.allocate(name, 1 + i % self.config.block_size)
        self.manager.evict(max(0, self.config.batch - self.manager.gpu.num_free))
        batch = self.manager.batch(names)
        spent = seconds(lambda: self.steps(batch))
        for name in names:
            self.manager.free(name)
        return spent

    def steps(self, batch: Any) -> None:
        for _ in range(self.config.block_size):
            self.manager.append_batch(batch)

    def time_append(self) -> float:
        self.manager.allocate("probe", 1)
        spent = seconds(lambda: [self.manager.append("probe") for _ in range(64)])
        self.manager.free("probe")
        return spent

    def time_fork(self) -> float:
        self.admit()
        spent = seconds(lambda: self.manager.fork(self.newest, "twin"))
        self.manager.free("twin")
        self.manager.free(self.newest)
        return spent

    def time_free(self) -> float:
        self.admit()
        return seconds(lambda: self.manager.free(self.newest))

    def time_evict(self) -> float:
        return seconds(lambda: self.manager.evict(self.blocks_a_prompt))


def rows_of(config: Config, num_blocks: int) -> list[Row]:
    """Return one row for each operation on a pool."""
    rows = []
    workload = Workload(config, num_blocks)
    for operation, unit, count, timings in workload.measure():
        median = statistics.median(timings)
        rows.append(
            {"num_blocks": num_blocks, "operation": operation, "unit": unit, "per_second": count / median,
             "per_second_best": count / min(timings), "ns_per_unit": median / count * 1e9,
             "us_per_call": median * 1e6, "repeats": len(timings)}
        )  # fmt: skip
    workload.manager.check()
    return rows


def rate(rows: list[Row], operation: str, key: str = "per_second") -> list[float]:
    """Return the rates of an operation, smallest pool first."""
    return [row[key] for row in rows if row["operation"] == operation]


def expectation(config: Config) -> str:
    """Return what the hash alone allows."""
    prompt = Prompts(config.prompt_tokens)[0]
    fastest = min(seconds(lambda: chain(b"", prompt, config.block_size)) for _ in range(50))
    per_block = fastest / (config.prompt_tokens // config.block_size)
    return (
        f"Expect: one BLAKE2b digest a block takes {per_block * 1e9:.0f} ns here, so admission cannot pass "
        f"{config.block_size / per_block / 1e6:.0f} M tokens/s; the rest is some 40 NumPy calls a prompt and two "
        f"dictionary operations a block, about as much again. A batch step without new blocks is eight NumPy calls, "
        f"4 us for {config.batch} sequences; one step in {config.block_size} maps a block. Nothing scans the pool, so "
        f"only cache misses can make a large one slower."
    )


def conclusion(rows: list[Row]) -> str:
    """Return what the rows say."""
    parts = []
    for operation in ("admit", "admit, evicting", "take cached prefix", "append"):
        rates = rate(rows, operation)
        best = rate(rows, operation, "per_second_best")
        reached = sum(value >= AIM for value in rates)
        compared = NANO_VLLM[operation.split(",")[0]]
        parts.append(
            f"{operation} runs at {min(rates) / 1e6:.1f} to {max(rates) / 1e6:.1f} M/s, {max(best) / 1e6:.1f} at best, "
            f"reaches 20 M/s on {reached} of {len(rates)} pool sizes and is {min(rates) / compared:.1f} times "
            f"nano-vllm's or more"
        )
    managed = {row["operation"] for row in rows} - {"hash alone"}
    growth = {name: rate(rows, name)[0] / rate(rows, name)[-1] for name in managed}
    slowest = max(growth, key=growth.__getitem__)
    sizes = sorted({row["num_blocks"] for row in rows})
    return (
        f"Found: {'; '.join(parts)}. From {sizes[0]:,} to {sizes[-1]:,} blocks, {slowest} grows most, by a factor of "
        f"{growth[slowest]:.1f}; append grows by {growth['append']:.2f}."
    )


def draw(rows: list[Row], path: Path) -> None:
    """Draw rates against the aim, and the cost of each operation against the size of the pool."""
    figure, (left, right) = new_figure(2, width=12.5, height=4.8)
    sizes = sorted({row["num_blocks"] for row in rows})
    shown = {"append": "C2", "take cached prefix": "C0", "admit": "C1", "admit, evicting": "C3"}
    for operation, color in shown.items():
        best, median = rate(rows, operation, "per_second_best"), rate(rows, operation)
        left.plot(sizes, best, "o-", color=color, label=f"{operation} (cupaged)")
        left.vlines(sizes, median, best, color=color, lw=3, alpha=0.35)
        if operation in NANO_VLLM:
            left.axhline(NANO_VLLM[operation], color=color, ls=":", lw=1.2)
            left.text(sizes[0], NANO_VLLM[operation] * 1.08, f"{operation}: nano-vllm", color=color, fontsize=8)
    left.axhline(AIM, color="black", ls="--", lw=1)
    left.text(sizes[-1], AIM * 1.1, "aim: 20 M/s", ha="right", va="bottom", fontsize=8)
    left.set(xscale="log", yscale="log", ylim=(1e4, 2e8), xlabel="blocks in the pool, all of them cached content",
             ylabel="tokens/s, or sequence-steps/s", title="Rates: best, and bars down to the median")  # fmt: skip
    left.legend(loc="lower right", bbox_to_anchor=(1, 0.13), fontsize=8)
    for operation in ("admit, evicting", "admit", "take cached prefix", "free", "evict", "fork"):
        color = shown.get(operation) or {"free": "C4", "evict": "C5", "fork": "C6"}[operation]
        right.plot(sizes, rate(rows, operation, "us_per_call"), "o-", label=operation, color=color)
    right.plot(sizes, [us / 16 for us in rate(rows, "append", "us_per_call")], "o-", color="C2",
               label="append to 256 sequences")  # fmt: skip
    right.set(xscale="log", yscale="log", ylim=(1, 1000), xlabel="blocks in the pool, all of them cached content",
              ylabel="microseconds a call (median)", title="One call: a prompt of 2048 tokens, 128 blocks")  # fmt: skip
    right.legend(fontsize=8, ncols=2, loc="lower right")
    save_figure(figure, path)


class Bookkeeping(Experiment):
    """Every operation, on pools of every size."""

    place, runs_on, unit = 190, "cpu", "pool"
    failures = ()  # nothing here may fail
    configs = CONFIGS

    def expect(self) -> str:
        return expectation(self.config)

    def cells(self) -> Sequence[int]:
        return self.config.block_counts

    def what(self, cell: int) -> Row:
        return {"num_blocks": cell}

    def rows(self, cell: int) -> list[Row]:
        return rows_of(self.config, cell)

    def title(self) -> str:
        return "Bookkeeping, one thread"

    def draw(self, rows: list[Row], path: Path) -> None:
        draw(rows, path)


EXPERIMENT = Bookkeeping()

if __name__ == "__main__":
    run_script(EXPERIMENT)

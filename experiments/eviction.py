"""Which eviction policy keeps what will be wanted again, and who waits while blocks are evicted?

Part one sends prompts with reuse through the memory manager: documents asked about by Zipf's law, conversations of many
turns, and a hot set with a scan of one-off documents through it. For each policy and pool size it counts the prefix
blocks that were found, against Belady's optimum, which knows the future. Part two times every `allocate` on a full
pool, with eviction on the spot, by a background thread and between requests, and shows the tail, not the mean.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    print_table,
    ratio,
    save_figure,
    write_results,
)
from cupaged.memory.eviction import POLICIES, belady_hits
from cupaged.memory.manager import BlockManager
from cupaged.memory.prefix_cache import chain
from cupaged.memory.watermark import WatermarkEvictor

PAR_CONTEXT = 30_000.0
"""Context at which attention costs as much as the rest of a model of 8 billion parameters; see `eviction.Cost`."""


@dataclass(frozen=True)
class Config:
    """What is sent and measured."""

    requests: int = 3000
    pool_shares: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
    running: int = 4
    block_size: int = 16
    seed: int = 0
    latency_requests: int = 4000
    latency_pool: int = 20_000
    latency_tokens: int = 2048
    gap_seconds: float = 3e-4


SMOKE = Config(requests=150, pool_shares=(0.1, 0.4), latency_requests=150, latency_pool=3000)
CONFIGS = {("cpu", False): Config(), ("cpu", True): SMOKE}
HIT_COLUMNS = {
    "workload": "workload", "pool_share": "pool share|.2f", "num_blocks": "blocks|,", "policy": "policy",
    "hit_rate": "hit rate|.3f", "of_belady": "of Belady's|.3f", "computation_saved": "computation saved|.3f",
}  # fmt: skip
LATENCY_COLUMNS = {
    "policy": "policy", "mode": "eviction",
    **{name: f"{name}|.0f" for name in ("p50", "p90", "p99", "p99_9", "max", "mean")},
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A request: its tokens, int32, and how much its content is worth to whoever sends it."""

    tokens: np.ndarray
    priority: int = 0


def text(random: np.random.Generator, num_tokens: int) -> np.ndarray:
    """Return tokens that occur nowhere else."""
    return random.integers(0, 2**30, num_tokens, dtype=np.int32)


def zipf_choice(random: np.random.Generator, num_items: int, size: int) -> np.ndarray:
    """Return items chosen with probability proportional to 1 / rank."""
    weights = 1 / np.arange(1, num_items + 1)
    return random.choice(num_items, size, p=weights / weights.sum())


def documents(config: Config, random: np.random.Generator) -> Iterator[Prompt]:
    """Questions about documents, some of which are asked about far more often than others."""
    shelf = [text(random, int(length)) for length in random.integers(100, 3000, max(20, config.requests // 10))]
    for number in zipf_choice(random, len(shelf), config.requests):
        yield Prompt(np.concatenate([shelf[number], text(random, 40)]), priority=int(number < len(shelf) // 10))


def conversations(config: Config, random: np.random.Generator) -> Iterator[Prompt]:
    """Turns of 60 conversations, each prompt its whole history; some users answer soon, some after a long time."""
    system = text(random, 200)
    open_now = [system] * 60
    haste = random.exponential(size=len(open_now))
    for _ in range(config.requests):
        number = random.choice(len(open_now), p=haste / haste.sum())
        open_now[number] = np.concatenate([open_now[number], text(random, int(random.integers(50, 350)))])
        yield Prompt(open_now[number], priority=int(haste[number] > 1))
        if random.random() < 0.1:
            open_now[number] = system
            haste[number] = random.exponential()


def polluted(config: Config, random: np.random.Generator) -> Iterator[Prompt]:
    """A hot set of 40 documents, and after each ten requests for it a long document that nobody asks for again."""
    shelf = [text(random, 600) for _ in range(40)]
    for step, number in enumerate(zipf_choice(random, len(shelf), config.requests)):
        if step % 11 == 10:
            yield Prompt(text(random, 6000), priority=-1)
        else:
            yield Prompt(np.concatenate([shelf[number], text(random, 40)]))


WORKLOADS: dict[str, Callable[[Config, np.random.Generator], Iterator[Prompt]]] = {
    "documents by Zipf's law": documents, "conversations": conversations, "hot set and scan": polluted,
}  # fmt: skip


def findable(config: Config, prompt: Prompt) -> list[bytes]:
    """Return the names of the blocks that a prompt could find: the last token is always computed."""
    return chain(b"", prompt.tokens[:-1], config.block_size)


def cost_of(depth: np.ndarray, block_size: int) -> np.ndarray:
    """Return what it takes to compute blocks at some depth, where a block without context takes 1."""
    return 1 + depth * block_size / PAR_CONTEXT


def replay(config: Config, prompts: list[Prompt], policy: str, num_blocks: int) -> tuple[float | None, float | None]:
    """Return the shares of findable blocks, and of their computation, that a policy saves; None of no blocks."""
    manager = BlockManager(num_blocks, block_size=config.block_size, eviction=policy, max_blocks_per_seq=512)
    running: deque[int] = deque()
    found = wanted = found_cost = wanted_cost = 0.0
    for number, prompt in enumerate(prompts):
        while len(running) >= config.running or (running and not manager.can_allocate(prompt.tokens)):
            manager.free(running.popleft())
        manager.allocate(number, prompt.tokens, priority=prompt.priority)
        running.append(number)
        hits = manager.cached_tokens(number) // config.block_size
        costs = cost_of(np.arange((len(prompt.tokens) - 1) // config.block_size), config.block_size)
        found, wanted = found + hits, wanted + len(costs)
        found_cost, wanted_cost = found_cost + costs[:hits].sum(), wanted_cost + costs.sum()
    return ratio(found, wanted), ratio(found_cost, wanted_cost)


def of_best(rate: float | None, best: float | None) -> float | None:
    """Return a hit rate over Belady's; None where he hits nothing either."""
    return None if rate is None or best is None else ratio(rate, best)


@lru_cache(maxsize=1)
def sent(config: Config, workload: str) -> tuple[list[Prompt], list[int]]:
    """Return a workload's prompts, and the number of each block that they could find, in order of access."""
    prompts = list(WORKLOADS[workload](config, np.random.default_rng(config.seed)))
    names: dict[bytes, int] = {}
    return prompts, [names.setdefault(name, len(names)) for prompt in prompts for name in findable(config, prompt)]


def hit_rates(config: Config, workload: str, pool_share: float) -> list[Row]:
    """Return one row for each policy, Belady's first."""
    prompts, accesses = sent(config, workload)
    longest = max(len(prompt.tokens) for prompt in prompts) // config.block_size + 1
    num_blocks = max(longest, round(pool_share * len(set(accesses))))
    best = ratio(int(belady_hits(accesses, num_blocks).sum()), len(accesses))
    common = {"workload": workload, "pool_share": pool_share, "num_blocks": num_blocks}
    rows = [{**common, "policy": "Belady", "hit_rate": best, "of_belady": of_best(best, best)}]
    for policy in POLICIES:
        rate, saved = replay(config, prompts, policy, num_blocks)
        rows.append({**common, "policy": policy, "hit_rate": rate, "of_belady": of_best(rate, best),
                     "computation_saved": saved})  # fmt: skip
    return rows


# ---- who waits ------------------------------------------------------------------------------------------------------


def latencies(config: Config, policy: str, mode: str) -> np.ndarray:
    """Return how long each `allocate` of a new prompt takes on a full pool, in microseconds."""
    manager = BlockManager(config.latency_pool, block_size=config.block_size, eviction=policy)
    base = text(np.random.default_rng(config.seed), config.latency_tokens)
    blocks_a_prompt = config.latency_tokens // config.block_size
    for number in range(config.latency_pool // blocks_a_prompt + 1):
        manager.allocate("fill", base + np.int32(number))
        manager.free("fill")
    evictor = WatermarkEvictor(manager, high=0.95, low=0.9)
    if mode == "background thread":
        evictor.start()
    spent = np.empty(config.latency_requests)
    for number in range(config.latency_requests):
        prompt = base - np.int32(number + 1)
        start = time.perf_counter()
        manager.allocate("request", prompt)
        spent[number] = time.perf_counter() - start
        manager.free("request")
        if mode == "between requests":
            while evictor.step():
                pass
        time.sleep(config.gap_seconds)
    evictor.stop()
    return spent * 1e6


MODES = ("on the spot", "background thread", "between requests")
TIMED_POLICIES = ("lru", "lfu")


def latency_row(config: Config, policy: str, mode: str) -> Row:
    """Return how the times of `allocate` are distributed, and the times, which the picture shows."""
    spent = latencies(config, policy, mode)
    quantiles = dict(zip(("p50", "p90", "p99", "p99_9"), np.quantile(spent, (0.5, 0.9, 0.99, 0.999)), strict=True))
    return {
        "policy": policy, "mode": mode, **quantiles, "max": spent.max(), "mean": spent.mean(), "_times": spent,
    }  # fmt: skip


# ---- report ---------------------------------------------------------------------------------------------------------


def parts(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows with hits, and those with times."""
    return [row for row in rows if "workload" in row], [row for row in rows if "mode" in row]


def expectation() -> str:
    """Return what one should see."""
    return (
        "Expect: policies differ most when the pool holds a tenth to a half of what is wanted. Where use is skewed, "
        "counting uses (lfu) should beat recency (lru), and a scan should hurt fifo and lru, which take every newcomer "
        "for wanted, but not lfu or priority. In conversations the last user of a block is its next, so lru should be "
        "near the best. Cost differs from lru only through deep blocks. An allocate that evicts 128 blocks pays for it "
        "(some 20 us by lru, 100 us by a heap); with a background thread the median should lose that, and the tail "
        "should not grow by more than a step of 64 blocks, for which the lock is held."
    )


def conclusion(rows: list[Row], timed: list[Row]) -> str:
    """Return what the rows say."""
    parts = []
    for workload in WORKLOADS:
        mean = {policy: mean_of_belady(rows, workload, policy) for policy in POLICIES}
        if None in mean.values():
            parts.append(f"{workload}: Belady finds nothing")
            continue
        best, worst = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
        parts.append(f"{workload}: {best} reaches {mean[best]:.0%} of Belady's hits, {worst} {mean[worst]:.0%}, "
                     f"lru {mean['lru']:.0%}")  # fmt: skip
    for policy in TIMED_POLICIES:
        spot, thread, between = (
            next(r for r in timed if r["policy"] == policy and r["mode"] == mode) for mode in MODES
        )
        parts.append(f"allocate with {policy}, median and p99.9: {spot['p50']:.0f} and {spot['p99_9']:.0f} us on the "
                     f"spot, {thread['p50']:.0f} and {thread['p99_9']:.0f} us with a thread, {between['p50']:.0f} and "
                     f"{between['p99_9']:.0f} us between requests")  # fmt: skip
    return "Found: " + "; ".join(parts) + "."


def mean_of_belady(rows: list[Row], workload: str, policy: str) -> float | None:
    """Return a policy's hits over Belady's, averaged over the pool sizes in which Belady finds any; None without."""
    mine = [row["of_belady"] for row in rows if row["workload"] == workload and row["policy"] == policy]
    found = [share for share in mine if share is not None]
    return float(np.mean(found)) if found else None


def draw(rows: list[Row], times: dict[tuple[str, str], np.ndarray], path: Path) -> None:
    """Draw hit rates against the size of the pool, and the tails of the latencies."""
    figure, axes = new_figure(3, 2, width=13, height=8.2)
    colors = dict(zip(POLICIES, ("C0", "C1", "C2", "C4", "C3"), strict=True))
    for axis, workload in zip(axes[0], WORKLOADS, strict=True):
        for policy in ("Belady", *POLICIES):
            picked = [row for row in rows if row["workload"] == workload and row["policy"] == policy]
            shares = [100 * row["pool_share"] for row in picked]
            style = {"color": "black", "ls": "--"} if policy == "Belady" else {"color": colors[policy], "marker": "."}
            label = "Belady (knows the future)" if policy == "Belady" else policy
            axis.plot(shares, [100 * (row["hit_rate"] or 0) for row in picked], label=label, **style)
        axis.set(title=workload, xlabel="pool, % of all distinct blocks", xscale="log", ylim=(0, None))
        axis.set_xticks(shares, [f"{share:g}" for share in shares])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("prefix blocks found, %")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    for axis, policy in zip(axes[1], TIMED_POLICIES, strict=False):
        for mode, color in zip(MODES, ("C3", "C0", "C2"), strict=True):
            spent = np.sort(times[policy, mode])
            slower = 1 - np.arange(len(spent)) / len(spent)
            axis.plot(spent, slower, color=color, label=f"{mode} (median {np.median(spent):.0f} us)")
        axis.set(xscale="log", yscale="log", xlabel="allocate takes longer than … us",
                 title=f"who waits for eviction: {policy}")  # fmt: skip
        axis.legend(fontsize=8, title="blocks are evicted", title_fontsize=8)
    axes[1, 0].set_ylabel("share of requests")
    axis = axes[1, 2]
    workloads = list(WORKLOADS)
    for place, policy in enumerate(POLICIES):
        means = [100 * (mean_of_belady(rows, workload, policy) or 0) for workload in workloads]
        axis.bar(np.arange(len(workloads)) + (place - 2) * 0.16, means, 0.15, color=colors[policy], label=policy)
    axis.set_xticks(
        range(len(workloads)), [workload.replace(" by ", "\nby ").replace(" and ", "\nand ") for workload in workloads]
    )
    axis.set(ylabel="hits, % of Belady's", title="mean over pool sizes", ylim=(0, 118))
    axis.legend(fontsize=8, ncols=5, loc="upper center", handlelength=0.8, columnspacing=0.8)
    save_figure(figure, path)


class Eviction(Experiment):
    """Hits of every policy in pools of every size, and how long `allocate` takes while blocks are evicted."""

    place, runs_on = 180, "cpu"
    failures = ()  # nothing here may fail
    configs = CONFIGS

    def expect(self) -> str:
        return expectation()

    def cells(self) -> list[Row]:
        hits = product(WORKLOADS, self.config.pool_shares)
        return [
            *({"workload": workload, "pool_share": share} for workload, share in hits),
            *({"policy": policy, "mode": mode} for policy, mode in product(TIMED_POLICIES, MODES)),
        ]

    def rows(self, cell: Row) -> list[Row]:
        return hit_rates(self.config, **cell) if "workload" in cell else [latency_row(self.config, **cell)]

    def show(self, rows: list[Row]) -> None:
        hits, timed = parts(rows)
        print_table(hits, HIT_COLUMNS, "Prefix blocks found")
        print_table(timed, LATENCY_COLUMNS, "Latency of allocate, us")

    def conclusion(self, rows: list[Row]) -> str:
        return conclusion(*parts(rows))

    def write(self, rows: list[Row], name: str, verdict: str) -> Path:
        hits, timed = parts(rows)
        write_results(timed, self.stamp, f"{name}_latency", self.options.out, **self.notes(timed))
        return super().write(hits, name, verdict)

    def draw(self, rows: list[Row], path: Path) -> None:
        hits, timed = parts(rows)
        draw(hits, {(row["policy"], row["mode"]): np.array(row["_times"]) for row in timed}, path)


EXPERIMENT = Eviction()

if __name__ == "__main__":
    run_script(EXPERIMENT)

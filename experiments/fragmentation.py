"""Where does the memory of a KV cache go, and how many requests fit, with contiguous regions and with pages?

The same requests arrive at the same memory, once for each way of allocating it:

    reserve-max        max_len slots for every request
    first-fit pow2     prompt + output rounded up to a power of two, in the lowest hole that is large enough
    first-fit oracle   exactly what the request will need, which no server knows
    buddy pow2         as first-fit, but from a buddy system, whose regions are powers of two
    buddy oracle
    paged 1 ... 256    blocks of so many tokens, each taken when a token needs one

Time goes in decode steps, which last equally long whatever runs; see cupaged/memory/replay.py for who is admitted,
refused and preempted.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    positive,
    print_table,
    ratio,
    save_figure,
    write_results,
)
from cupaged.memory.contiguous import Buddy, FirstFit, ReserveMax, Usage
from cupaged.memory.manager import BlockManager
from cupaged.memory.replay import STATES, ContiguousMemory, Memory, PagedMemory, Replay, Requests, replay
from cupaged.memory.sampler import WORKLOADS, Trace, exact_sum, load_trace, sample_trace

# Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023
# (arXiv 2309.06180): the memory in figure 2, the throughput in its abstract.
PAPER_PAGED = 0.963
PAPER_CONTIGUOUS = (0.204, 0.382)
PAPER_THROUGHPUT = (2, 4)
# The same share from the lengths of the Azure conversation trace of 2023 (Patel et al., "Splitwise", ISCA 2024).
AZURE_OCCUPANCY = {8: 0.997, 16: 0.994, 32: 0.988, 64: 0.975, 128: 0.951}
SAMPLER_SOURCE = (
    "lengths drawn from percentiles of the Azure LLM inference traces of 2023 (Microsoft, CC-BY): Patel et al., "
    '"Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024'
)
# The deep dive's example: tokens used of 2048 slots reserved, three times.
EXAMPLE_MAX_LEN, EXAMPLE_TOKENS = 2048, (312, 148, 1872)
NOTHING = "nothing: what it takes failed, or nothing ran"


@dataclass(frozen=True)
class Config:
    """How much memory there is, and how hard the requests press on it."""

    num_slots: int = 131_072
    """Token slots of the memory: 16 GiB at 128 KiB a token (32 layers, 8 KV heads of 128, 16 bits)."""
    max_len: int = 8_192
    """The longest request served; longer ones are left out, for every allocator alike."""
    load: float = 1.25
    """Tokens that would be held on average if every request ran when it arrives, over num_slots."""
    max_waiting: int = 64
    """A request that arrives while so many wait is refused."""
    warmup: float = 0.2
    """Share of the steps up to the last arrival that pass before averages begin; they end with that arrival."""
    block_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)


# --- what is compared -----------------------------------------------------------------------------


class System(NamedTuple):
    """A way to allocate: its block size if it has blocks, and how to set its memory up."""

    block_size: int | None
    memory: Callable[[], Memory]


def systems(requests: Requests, config: Config) -> dict[str, System]:
    """Return what is compared, by name, in the order of the rows."""
    slots, exact = config.num_slots, requests.final
    longest = np.full_like(exact, config.max_len)
    rounded = np.minimum(requests.prompt + power_of_two(requests.output), config.max_len)
    contiguous = {
        "reserve-max": lambda: ContiguousMemory(ReserveMax(slots, config.max_len), requests, longest),
        "first-fit pow2": lambda: ContiguousMemory(FirstFit(slots), requests, rounded),
        "first-fit oracle": lambda: ContiguousMemory(FirstFit(slots), requests, exact),
        "buddy pow2": lambda: ContiguousMemory(Buddy(slots), requests, rounded),
        "buddy oracle": lambda: ContiguousMemory(Buddy(slots), requests, exact),
    }
    paged = {
        f"paged {size}": System(size, lambda size=size: PagedMemory(slots, size, requests))
        for size in config.block_sizes
    }
    return {name: System(None, memory) for name, memory in contiguous.items()} | paged


def power_of_two(n: np.ndarray) -> np.ndarray:
    """Return the smallest power of two that is at least n."""
    return 1 << np.ceil(np.log2(n)).astype(np.int64)


def averages(outcome: Replay, window: slice) -> Row:
    """Return shares of the memory and requests at once, averaged over the steps in `window`, and counts in total."""
    usage, running = outcome.usage[window], outcome.running[window]
    shares = usage.mean(axis=0) / usage[0].sum()
    return {
        "status": "ok",
        "occupancy": Usage(*usage.sum(axis=0).tolist()).occupancy,
        **dict(zip(STATES, shares.tolist(), strict=True)),
        "running": float(running.mean()),
        "running_max": int(running.max()),
        "refused": int(outcome.refused[-1]),
        "preempted": int(outcome.preempted[-1]),
        "completed": int(outcome.completed[-1]),
    }


def stretches(outcome: Replay, points: int = 80) -> list[Row]:
    """Return a replay over time: averages over stretches of equal length, and the counts at the end of each."""
    edges = np.unique(np.linspace(0, len(outcome.usage), points + 1).astype(int)).tolist()
    return [
        {
            "step": begin,
            **dict(zip(STATES, outcome.usage[begin:end].mean(axis=0).round().astype(int).tolist(), strict=True)),
            "running": round(float(outcome.running[begin:end].mean()), 1),
            "waiting": round(float(outcome.waiting[begin:end].mean()), 1),
            "refused": int(outcome.refused[end - 1]),
            "preempted": int(outcome.preempted[end - 1]),
        }
        for begin, end in pairwise(edges)
    ]


def documents_example() -> list[Row]:
    """Return the deep dive's three requests: contiguous as it allocates them, and paged."""
    tokens, slots = sum(EXAMPLE_TOKENS), EXAMPLE_MAX_LEN * len(EXAMPLE_TOKENS)
    reserved, paged = ReserveMax(slots, EXAMPLE_MAX_LEN), BlockManager(num_gpu_blocks=slots // 16, block_size=16)
    for request, used in enumerate(EXAMPLE_TOKENS):
        reserved.allocate(request, tokens=used, reserve=EXAMPLE_MAX_LEN, final=used)
        paged.allocate(request, used)
    allocated = {"reserve-max 2048": reserved.usage().allocated, "paged 16": slots - paged.gpu.num_free * 16}
    return [
        {"system": name, "slots": count, "tokens": tokens, "occupancy": tokens / count}
        for name, count in allocated.items()
    ]


# --- what it says ---------------------------------------------------------------------------------


def expectation(trace: Trace, requests: Requests, config: Config) -> str:
    """Return what should come out, and why, from the lengths alone."""
    held = exact_sum(trace.token_steps()) / exact_sum(requests.output)
    final = np.average(requests.final, weights=requests.output)
    prompts = requests.prompt.sum() / requests.final.sum()
    fits, room = config.num_slots // config.max_len, config.num_slots / held
    return (
        f"While it runs, a request of this trace holds {held:,.0f} tokens on average, so {config.num_slots:,} slots "
        f"have room for about {room:.0f}. Reserve-max fits {config.num_slots:,} / {config.max_len:,} = {fits}, "
        f"whatever they hold: paging should run about {room / fits:.1f} times as many. Prompts are {prompts:.0%} of "
        "the tokens and fill their slots at once, so an allocator that knew each length would reserve only "
        f"{1 - held / final:.0%} too early, but lose its holes on top. Paging loses the rest of each last block: "
        f"{1 - trace.paged_occupancy(16):.1%} of its slots at block 16."
    )


def settle(rows: Sequence[Row]) -> list[Row]:
    """Return each claim of the documents beside the published figure, what the rows say, and a verdict."""
    paged, contiguous = paged_row(rows), contiguous_rows(rows)
    held = {row["system"]: row["tokens"] for row in contiguous}
    wasted = {row["system"]: row["reservation"] + row["internal"] + row["external"] for row in contiguous}
    gains = {row["system"]: ratio(paged["running"], row["running"]) for row in contiguous if paged}
    times = {name: gain for name, gain in gains.items() if gain is not None}
    in_use = f"{paged['tokens']:.1%} of all slots, {paged['occupancy']:.1%} of those allocated" if paged else NOTHING
    return [
        {
            "claim": "more than 96 % of the memory in use",
            "published": f"{PAPER_PAGED:.1%}",
            "measured": in_use,
            "verdict": verdict({paged["system"]: paged["tokens"]} if paged else {}, 0.96, 1),
        },
        {
            "claim": "less than 40 % before",
            "published": "{:.1%} to {:.1%}".format(*PAPER_CONTIGUOUS),
            "measured": span(held, ".1%", "of all slots"),
            "verdict": verdict(held, 0, 0.4),
        },
        {
            "claim": "fragmentation wastes 60 to 80 %",
            "published": "{1:.1%} to {0:.1%}".format(*(1 - share for share in PAPER_CONTIGUOUS)),
            "measured": span(wasted, ".1%", "of all slots"),
            "verdict": verdict(wasted, 0.6, 0.8),
        },
        {
            "claim": "5 to 10 times more requests at once",
            "published": "{} to {} times the throughput".format(*PAPER_THROUGHPUT),
            "measured": span(times, ".1f", "times"),
            "verdict": verdict(times, 5, 10),
        },
    ]


def span(values: Mapping[str, float], form: str, unit: str) -> str:
    """Return the least and the greatest value, each with whose it is."""
    if not values:
        return NOTHING
    least, greatest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"{values[least]:{form}} ({least}) to {values[greatest]:{form}} ({greatest}) {unit}"


def verdict(values: Mapping[str, float], low: float, high: float) -> str:
    """Return whose value lies where the claim puts it, and whose is more or less."""
    if not values:
        return "could not be measured"
    groups = {
        "holds": [name for name, value in values.items() if low <= value <= high],
        "more": [name for name, value in values.items() if value > high],
        "less": [name for name, value in values.items() if value < low],
    }
    if len(groups["holds"]) == len(values):
        return "holds"
    return "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items() if names)


def conclusion(rows: Sequence[Row], config: Config) -> str:
    failed = [row["system"] for row in rows if row["status"] != "ok"]
    said = f"Failed: {', '.join(failed)}. " if failed else ""
    paged, contiguous = paged_row(rows), contiguous_rows(rows)
    reserved = next((row for row in contiguous if row["system"] == "reserve-max"), None)
    if not (paged and reserved and paged["running"] and reserved["running"]):
        return (
            f"{said}Without requests that run both paged at block 16 and with reserve-max there is nothing to compare."
        )
    rival = max(contiguous, key=lambda row: row["running"])
    held = paged["tokens"] * config.num_slots / paged["running"]
    return said + (
        f"Paged at block {paged['block_size']}, {paged['tokens']:.1%} of the memory holds tokens and "
        f"{paged['running']:.0f} requests run at once: {paged['running'] / reserved['running']:.1f} times as many as "
        f"with reserve-max ({reserved['tokens']:.1%}), {paged['running'] / rival['running']:.1f} times as many as with "
        f"{rival['system']} ({rival['tokens']:.1%}). The gain over reserve-max is max_len over the {held:,.0f} tokens "
        f"that a request holds on average: it is 5 to 10 times where max_len is {5 * held:,.0f} to {10 * held:,.0f}."
    )


def paged_row(rows: Sequence[Row]) -> Row | None:
    """Return the row of the block size that the documents speak of, unless it failed."""
    return next((row for row in rows if row["block_size"] == 16 and row["status"] == "ok"), None)


def contiguous_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the allocators without blocks that did not fail."""
    return [row for row in rows if row["block_size"] is None and row["status"] == "ok"]


# --- how it looks ---------------------------------------------------------------------------------

MAP_COLUMNS = 200  # one every 3 decode steps
SHOWN = {"reserve-max": "#e53e3e", "buddy pow2": "#dd6b20", "first-fit oracle": "#805ad5", "paged 16": "#2b6cb0"}
PARTS = {
    "tokens": ("holds a token", "#2b6cb0"),
    "reservation": ("reserved, filled later", "#f6ad55"),
    "internal": ("reserved, never filled", "#e53e3e"),
    "external": ("free, in a hole too short for the next request", "#b794f4"),
    "free": ("free", "#e2e8f0"),
}


def draw(rows: Sequence[Row], shown: Mapping[str, Replay], trace: Trace, config: Config) -> Any:
    """Return a figure: a map of the memory over time for four allocators, then the averages that follow from it."""
    figure, axes = new_figure(width=14, height=9)
    axes.remove()
    rows = [row for row in rows if row["status"] == "ok"]
    run = {row["system"]: row["running"] for row in rows}
    named = {"paging": "paged 16", "reserve-max": "reserve-max"}
    at_once = ", ".join(f"{name} runs {run[system]:.0f} at once" for name, system in named.items() if system in run)
    figure.suptitle(
        f"The same requests ({trace.name}) in the same memory: {at_once or 'nothing ran'}\n"
        f"A quarter of the memory over {3 * MAP_COLUMNS} decode steps:",
        parse_math=False,
    )
    grid = figure.add_gridspec(2, 12, height_ratios=(1.2, 1))
    for column, (name, outcome) in enumerate(shown.items()):
        axes = figure.add_subplot(grid[0, 3 * column : 3 * column + 3])
        draw_map(axes, outcome, config)
        axes.set(title=name, xlabel="decode steps")
        if column == 0:
            axes.set_ylabel("address (token slots)")
        else:
            axes.set_yticklabels([])
    shares = figure.add_subplot(grid[1, 0:4])
    draw_shares(shares, rows)
    draw_running(figure.add_subplot(grid[1, 4:8]), shown)
    draw_block_sizes(figure.add_subplot(grid[1, 8:12]), rows, trace)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False)
    return figure


def draw_map(axes: Any, outcome: Replay, config: Config) -> None:
    """Draw what the first quarter of the memory holds; a pixel mixes the colours of its slots."""
    from matplotlib.colors import to_rgb

    quarter = max(1, config.num_slots // 4)
    pixels = min(256, quarter)
    slots = outcome.painted[:, : quarter // pixels * pixels]
    cells = slots.reshape(len(slots), pixels, -1)
    picture = sum(
        (cells == state).mean(axis=2)[..., None] * to_rgb(PARTS[name][1]) for state, name in enumerate(STATES)
    )
    axes.imshow(picture.transpose(1, 0, 2), origin="lower", aspect="auto", interpolation="nearest",
                extent=(0, 3 * len(slots), 0, slots.shape[1]))  # fmt: skip
    axes.grid(False)


def draw_shares(axes: Any, rows: Sequence[Row]) -> None:
    bars = [row for row in rows if row["block_size"] in (None, 1, 16, 256)]
    left = np.zeros(len(bars))
    for part, (label, color) in PARTS.items():
        share = np.array([100 * row[part] for row in bars])
        axes.barh([row["system"] for row in bars], share, left=left, color=color, label=label)
        left += share
    for row in bars:
        axes.text(1, row["system"], f"{row['tokens']:.0%}", color="white", va="center", fontsize=9)
    low, high = (100 * share for share in PAPER_CONTIGUOUS)
    axes.plot((low, high), (-0.9, -0.9), "|-", color="black")
    axes.text(high + 2, -0.9, "tokens before paging, vLLM paper", fontsize=8, va="center")
    axes.set(title="Average share of the memory (%)", xlim=(0, 100), ylim=(len(bars) - 0.5, -1.4))
    axes.grid(False)


def draw_running(axes: Any, shown: Mapping[str, Replay]) -> None:
    for name, outcome in shown.items():
        points = stretches(outcome)
        axes.plot([point["step"] for point in points], [point["running"] for point in points],
                  drawstyle="steps-post", color=SHOWN[name], label=name)  # fmt: skip
    most = max((outcome.running.max() for outcome in shown.values()), default=1)
    axes.set(title="Requests running at once", xlabel="decode step", ylim=(0, 1.25 * most))
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center")


def draw_block_sizes(axes: Any, rows: Sequence[Row], trace: Trace) -> None:
    paged = [row for row in rows if row["block_size"]]
    sizes = [row["block_size"] for row in paged]
    axes.plot(sizes, [100 * trace.paged_occupancy(size) for size in sizes], color="#2b6cb0", label="from lengths alone")
    axes.plot(sizes, [100 * row["occupancy"] for row in paged], "o", color="#2b6cb0", label="in the replay")
    axes.plot(list(AZURE_OCCUPANCY), [100 * share for share in AZURE_OCCUPANCY.values()], "x", color="black",
              label="published, Azure conversation")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, sizes)
    axes.set(title="Allocated slots that hold tokens (%)", xlabel="block size (tokens)")
    axes.legend(frameon=False, fontsize=9, loc="lower left")


MEMORY_TABLE = {
    "system": "share of all slots", "tokens": "tokens|.1%", "reservation": "reserved|.1%",
    "internal": "internal|.1%", "external": "external|.1%", "free": "free|.1%", "occupancy": "occupancy|.2%",
}  # fmt: skip
REQUEST_TABLE = {
    "system": "requests", "running": "at once|.1f", "running_max": "most|,", "refused": "refused|,",
    "preempted": "preempted|,", "completed": "completed|,", "status": "status",
}  # fmt: skip


# --- the command ----------------------------------------------------------------------------------


def trace_of(arguments: Namespace) -> tuple[str, Trace, str]:
    """Return the name of the results, the trace, and its source."""
    number = arguments.requests or (500 if arguments.smoke else None)
    if arguments.trace:
        trace = load_trace(arguments.trace, limit=number)
        return f"fragmentation_{trace.name}", trace, arguments.cite
    trace = sample_trace(number or 10_000, arguments.workload, seed=arguments.seed)
    return "fragmentation", trace, SAMPLER_SOURCE


def served(whole: Trace, config: Config) -> Trace:
    """Return the requests that generate something and are not too long."""
    trace = whole[(whole.output_tokens > 0) & (whole.total_tokens <= config.max_len)]
    if len(trace) < 2:
        raise ValueError(
            f"trace must hold at least two requests that generate a token and have at most {config.max_len} tokens "
            f"(--max-len), got {len(trace)} of {len(whole)}"
        )
    return trace


class Fragmentation(Experiment):
    """The same requests, at the same memory allocated in every way."""

    place, runs_on, spreads, unit = 160, "cpu", True, "system"

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--trace", type=Path, help="a trace file in Azure, BurstGPT, Mooncake or Vidur columns, plain or .gz"
        )
        parser.add_argument("--cite", default="", help="the trace's source and licence, kept with the results")
        parser.add_argument("--workload", choices=tuple(WORKLOADS), default="conversation", help="what is sampled")
        parser.add_argument(
            "--requests", type=positive(int), help="how many (default: 10,000 sampled, or the whole trace)"
        )
        parser.add_argument("--seed", type=int, default=0, help="of the sampler")
        parser.add_argument("--slots", type=positive(int), default=Config.num_slots, help="token slots of the memory")
        parser.add_argument("--max-len", type=positive(int), default=Config.max_len, help="the longest request served")
        load_help = "tokens offered, over slots: above 1, memory is short"
        parser.add_argument("--load", type=positive(float), default=Config.load, help=load_help)

    def set_up(self) -> None:
        options = self.options
        if options.slots < options.max_len:
            raise ValueError(f"--slots must hold a request of --max-len {options.max_len}, got {options.slots}")
        sizes = (1, 16, 256) if self.smoke else Config.block_sizes
        self.config = Config(options.slots, options.max_len, options.load, block_sizes=sizes)
        try:
            self.results, self.whole, self.citation = trace_of(options)
        except OSError as error:
            raise ValueError(str(error)) from None
        self.trace = served(self.whole, self.config)
        self.requests = Requests.from_trace(self.trace, self.config.load * self.config.num_slots)
        self.kept: dict[str, Replay] = {}

    def expect(self) -> str:
        return f"To expect. {expectation(self.trace, self.requests, self.config)}"

    def cells(self) -> list[str]:
        return list(systems(self.requests, self.config))

    def what(self, cell: str) -> Row:
        return {"system": cell, "block_size": systems(self.requests, self.config)[cell].block_size}

    def measure(self, cell: str) -> Row:
        outcome = self.replay(cell)
        if cell in SHOWN:
            self.kept[cell] = outcome
        last = int(self.requests.arrival[-1])
        return averages(outcome, slice(int(self.config.warmup * last), last + 1))

    def replay(self, name: str) -> Replay:
        """Return what happens in a system; with a map of its memory, if the picture shows it."""
        middle = int(self.requests.arrival[-1]) // 2
        paint_at = range(middle, middle + 3 * MAP_COLUMNS, 3) if name in SHOWN else range(0)
        memory = systems(self.requests, self.config)[name].memory()
        return replay(self.requests, memory, self.config.max_waiting, paint_at)

    def compare(self, rows: list[Row]) -> list[Row]:
        good = [row["system"] for row in rows if row["status"] == "ok"]
        # once more for those that another process, or an earlier run, measured
        self.shown = {name: self.kept.get(name) or self.replay(name) for name in good if name in SHOWN}
        return rows

    def show(self, rows: list[Row]) -> None:
        columns = {"system": "", "slots": "slots allocated|,", "tokens": "tokens|,", "occupancy": "occupancy|.1%"}
        print_table(documents_example(), columns, "The documents' example: 312, 148 and 1872 tokens")
        title = f"{self.config.num_slots:,} slots, on average; occupancy is of allocated slots"
        print_table(rows, MEMORY_TABLE, title)
        served = f"{len(self.trace):,} requests ({self.trace.name}), load {self.config.load}"
        print_table(rows, REQUEST_TABLE, f"{served}: a decode step is {self.step_ms():.0f} ms of the trace")
        claims = settle(rows)
        print_table(claims, {key: key for key in claims[0]}, "The claims")

    def step_ms(self) -> float:
        """Return how long a decode step is in the trace's time."""
        return 1000 * (self.trace.arrival[-1] - self.trace.arrival[0]) / self.requests.arrival[-1]

    def conclusion(self, rows: list[Row]) -> str:
        return conclusion(rows, self.config)

    def notes(self, rows: list[Row]) -> Row:
        return {
            "trace": self.trace.name, "citation": self.citation, **super().notes(rows), "requests": len(self.trace),
            "left_out": len(self.whole) - len(self.trace), "milliseconds_per_step": round(self.step_ms(), 1),
            "documents_example": documents_example(), "claims": settle(rows),
        }  # fmt: skip

    def file_name(self) -> str:
        return self.results

    def write(self, rows: list[Row], name: str, verdict: str) -> Path:
        timeline = [{"system": system, **row} for system, outcome in self.shown.items() for row in stretches(outcome)]
        of_trace = {"trace": self.trace.name, "citation": self.citation}
        write_results(timeline, self.stamp, f"{name}_over_time", self.options.out, **of_trace)
        return super().write(rows, name, verdict)

    def draw(self, rows: list[Row], path: Path) -> None:
        save_figure(draw(rows, self.shown, self.trace, self.config), path)


EXPERIMENT = Fragmentation()

if __name__ == "__main__":
    run_script(EXPERIMENT)

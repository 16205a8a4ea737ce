"""How much memory does sharing save: samples of one prompt, beams, a common system prompt, turns of a conversation?

Runs each workload through the memory manager, with fork and copy-on-write or with the prefix cache, and compares the
blocks that are used with those that would be if nothing were shared, at every step. Published: the vLLM paper
(arXiv 2309.06180, section 6.3) saves 6.1 to 9.8 % (Alpaca) and 16.2 to 30.5 % (ShareGPT) by parallel sampling, and 37.6
to 55.2 % and 44.3 to 66.3 % by beam search, with 2 to 6 samples or beams.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    print_table,
    ratio,
    save_figure,
)
from cupaged.memory.manager import BlockManager

PUBLISHED = {
    ("parallel sampling", "Alpaca"): (6.1, 9.8), ("parallel sampling", "ShareGPT"): (16.2, 30.5),
    ("beam search", "Alpaca"): (37.6, 55.2), ("beam search", "ShareGPT"): (44.3, 66.3),
}  # fmt: skip
"""Memory saved, percent, over 2 to 6 samples or beams: arXiv 2309.06180, section 6.3."""


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of a data set in tokens, arXiv 2309.06180, figure 11; their spread is assumed to be lognormal."""

    name: str
    prompt: float
    output: float
    sigma: float = 0.8

    def sample(self, random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return prompt and output lengths, int64 [size] each, of at least one token."""

        def draw(mean: float) -> np.ndarray:
            return np.maximum(1, random.lognormal(np.log(mean) - self.sigma**2 / 2, self.sigma, size)).astype(np.int64)

        return draw(self.prompt), draw(self.output)


DATA_SETS = (Lengths("Alpaca", 19.31, 58.45), Lengths("ShareGPT", 161.31, 337.99))


@dataclass(frozen=True)
class Config:
    """What is run."""

    block_size: int = 16
    requests: int = 150
    widths: tuple[int, ...] = (2, 4, 6)
    system_tokens: tuple[int, ...] = (100, 500, 2000)
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    conversations: int = 60
    turns: int = 10
    beam_vocabulary: int = 64
    beam_spread: float = 2.5
    seed: int = 0


CONFIGS = {
    ("cpu", False): Config(),
    ("cpu", True): Config(requests=4, widths=(2, 4), concurrency=(1, 8), conversations=3, turns=3),
}
SYSTEM_PROMPT, CHAT = "system prompt", "multi-turn chat"


class Usage:
    """Blocks used, and blocks that would be used without sharing, summed over steps."""

    def __init__(self) -> None:
        self.used = self.unshared = 0

    def add(self, manager: BlockManager) -> None:
        """Count the present step."""
        self.used += manager.gpu.num_used
        self.unshared += int(manager.tables.num_blocks.sum())

    @property
    def saved(self) -> float | None:
        """Share of the unshared blocks that sharing saves, percent; None if there were none."""
        used = ratio(self.used, self.unshared)
        return None if used is None else 100 * (1 - used)


def new_manager(config: Config, **options: Any) -> BlockManager:
    return BlockManager(1 << 20, block_size=config.block_size, **options)


def parallel_sampling(config: Config, lengths: Lengths, width: int) -> Row:
    """Draw several outputs for each prompt: forks of one sequence, each with its own length."""
    random = np.random.default_rng(config.seed)
    usage, steps = Usage(), 0
    manager = new_manager(config, prefix_caching=False)
    for prompt in lengths.sample(random, config.requests)[0].tolist():
        names = list(range(width))
        manager.allocate(0, prompt)
        for sample in names[1:]:
            manager.fork(0, sample)
        left = dict(zip(names, lengths.sample(random, width)[1].tolist(), strict=True))
        while left:
            steps += len(left)
            manager.append_batch(left)
            usage.add(manager)
            left = {name: count - 1 for name, count in left.items()}
            for name in [name for name, count in left.items() if count == 0]:
                manager.free(name)
                del left[name]
    return {"saved_percent": usage.saved, "copies_per_1000_tokens": ratio(1000 * manager.counters.copies, steps)}


def beam_search(config: Config, lengths: Lengths, width: int) -> Row:
    """Keep the best `width` continuations at each step: some beams fork, others die, and tails are copied."""
    random = np.random.default_rng(config.seed)
    usage, steps = Usage(), 0
    manager = new_manager(config, prefix_caching=False)
    fresh = itertools.count()
    for prompt, output in zip(*(side.tolist() for side in lengths.sample(random, config.requests)), strict=True):
        beams = [next(fresh)]
        manager.allocate(beams[0], prompt)
        scores = np.zeros(1)
        for _ in range(output):
            parents, scores = best_continuations(config, random, scores, width)
            beams = reorder(manager, beams, parents, fresh)
            manager.append_batch(beams)
            usage.add(manager)
            steps += len(beams)
        for beam in beams:
            manager.free(beam)
    return {"saved_percent": usage.saved, "copies_per_1000_tokens": ratio(1000 * manager.counters.copies, steps)}


def best_continuations(
    config: Config, random: np.random.Generator, scores: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the parents and scores of the best candidates, with made-up next-token probabilities.

    Each beam draws logits from a normal distribution, whose spread decides how sure the model is: at 2.5 the likeliest
    of 64 tokens has a probability of 0.40 on average. No model runs here, so this is an assumption.
    """
    logits = random.normal(0, config.beam_spread, (len(scores), config.beam_vocabulary))
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    candidates = (scores[:, None] + log_probabilities).ravel()
    best = np.argpartition(-candidates, width)[:width]
    return best // config.beam_vocabulary, candidates[best]


def reorder(manager: BlockManager, beams: list[int], parents: np.ndarray, fresh: Iterator[int]) -> list[int]:
    """Let each parent live on in its first child and fork for the others; free the beams without children."""
    children: list[int] = []
    seen: Counter[int] = Counter()
    for parent in parents.tolist():
        child = next(fresh) if seen[parent] else beams[parent]
        if seen[parent]:
            manager.fork(beams[parent], child)
        seen[parent] += 1
        children.append(child)
    for place, beam in enumerate(beams):
        if not seen[place]:
            manager.free(beam)
    return children


def system_prompt(config: Config, system_tokens: int, concurrency: int) -> Row:
    """Run requests side by side whose prompts begin with the same system prompt, found by the prefix cache."""
    random = np.random.default_rng(config.seed)
    manager, usage = new_manager(config), Usage()
    system = random.integers(0, 2**30, system_tokens, dtype=np.int32)
    prompts, outputs = DATA_SETS[1].sample(random, concurrency)
    for name, prompt in enumerate(prompts.tolist()):
        manager.allocate(name, np.concatenate([system, random.integers(0, 2**30, prompt, dtype=np.int32)]))
    left = dict(enumerate(outputs.tolist()))
    while left:
        manager.append_batch(left)
        usage.add(manager)
        left = {name: count - 1 for name, count in left.items() if count > 1}
    return {"saved_percent": usage.saved}


def chat(config: Config) -> list[Row]:
    """Send conversations turn by turn, each prompt the whole history; return what each turn finds in the cache."""
    random = np.random.default_rng(config.seed)
    manager = new_manager(config)
    histories = [np.empty(0, np.int32)] * config.conversations
    rows = []
    for turn in range(1, config.turns + 1):
        found = asked = 0
        for number in range(config.conversations):
            prompt, output = (int(side[0]) for side in DATA_SETS[1].sample(random, 1))
            question, answer = (random.integers(0, 2**30, size, dtype=np.int32) for size in (prompt, output))
            histories[number] = np.concatenate([histories[number], question])
            manager.allocate(number, histories[number])
            found, asked = found + manager.cached_tokens(number), asked + len(histories[number])
            manager.append(number, answer)
            manager.free(number)
            histories[number] = np.concatenate([histories[number], answer])
        rows.append({"turn": turn, "found_percent": ratio(100 * found, asked)})
    return rows


FORKED = {"parallel sampling": parallel_sampling, "beam search": beam_search}
EXPECTATION = (
    "Expect: n samples of a prompt of p blocks with outputs of q blocks need p + n q blocks instead of n (p + q), so a "
    "share of (n - 1) p / (n (p + q)) is saved: 16 % for two samples at the end of ShareGPT's mean output, more before "
    "it, and less for Alpaca, whose prompts fill one or two blocks of which the last, partial one is copied. Beams "
    "share their outputs too, as long as they have a common ancestor, so they save most, and more the wider. A system "
    "prompt of s blocks saves (n - 1) s of n (s + rest): towards s / (s + rest). A conversation finds all but the new "
    "question."
)


def conclusion(rows: list[Row]) -> str:
    """Return what the rows say."""
    parts = []
    for (workload, lengths), (low, high) in PUBLISHED.items():
        saved = saved_by([row for row in rows if (row["workload"], row["lengths"]) == (workload, lengths)])
        parts.append(f"{workload} on lengths like {lengths}'s saves {min(saved):.1f} to {max(saved):.1f} % "
                     f"(published: {low} to {high} %)")  # fmt: skip
    prompts = [row for row in rows if row["workload"] == SYSTEM_PROMPT]
    many = max(prompts, key=lambda row: row["saved_percent"] or 0)
    last = [row for row in rows if row["workload"] == CHAT][-1]
    saved = saved_by(rows)
    return (
        f"Found: {'; '.join(parts)}; a system prompt of {many['system_tokens']} tokens before {many['concurrency']} "
        f"requests saves {many['saved_percent']:.0f} %; turn {last['turn']} of a chat finds "
        f"{last['found_percent']:.0f} % of its prompt. 'Prefix sharing saves 50 %' holds in "
        f"{sum(share >= 50 for share in saved)} of {len(saved)} cases, which save {min(saved):.0f} to "
        f"{max(saved):.0f} %: it is a property of the workload."
    )


def saved_by(rows: list[Row]) -> list[float]:
    """Return what sharing saves in these rows, where there was something to save."""
    return [row["saved_percent"] for row in rows if row.get("saved_percent") is not None]


def draw(rows: list[Row], path: Path) -> None:
    """Draw memory saved against samples and beams beside what was published, system prompts, and chat turns."""
    figure, axes = new_figure(2, 2, width=11.5, height=8)
    colors = {"Alpaca": "C1", "ShareGPT": "C0"}
    for axis, workload in zip(axes[0], ("parallel sampling", "beam search"), strict=True):
        for lengths, color in colors.items():
            picked = [row for row in rows if (row["workload"], row["lengths"]) == (workload, lengths)]
            widths = [row["width"] for row in picked]
            axis.plot(widths, [row["saved_percent"] for row in picked], "o-", color=color, label=f"{lengths}, measured")
            low, high = PUBLISHED[workload, lengths]
            axis.fill_between(widths, low, high, color=color, alpha=0.15, label=f"{lengths}, published range")
        xlabel = "samples of a prompt" if workload == "parallel sampling" else "beams"
        axis.set(title=workload, xlabel=xlabel, ylabel="memory saved by sharing, %", ylim=(0, 100))
        axis.set_xticks(widths)
        axis.legend(fontsize=8, loc="upper left", ncols=2)
    left, right = axes[1]
    for tokens in sorted({row["system_tokens"] for row in rows if "system_tokens" in row}):
        picked = [row for row in rows if row.get("system_tokens") == tokens]
        left.plot([row["concurrency"] for row in picked], [row["saved_percent"] for row in picked], "o-",
                  label=f"{tokens} tokens")  # fmt: skip
    left.set(title="a common system prompt", xlabel="requests at once", ylabel="memory saved by sharing, %")
    left.set(xscale="log", ylim=(0, 100))
    ticks = sorted({row["concurrency"] for row in rows if "concurrency" in row})
    left.set_xticks(ticks, ticks)
    left.minorticks_off()
    left.legend(fontsize=8, title="system prompt", title_fontsize=8)
    picked = [row for row in rows if row["workload"] == CHAT]
    right.bar([row["turn"] for row in picked], [row["found_percent"] for row in picked], color="C2")
    right.set(title="multi-turn chat", xlabel="turn", ylabel="prompt tokens found in the cache, %", ylim=(0, 100))
    right.set_xticks([row["turn"] for row in picked])
    save_figure(figure, path)


class PrefixSharing(Experiment):
    """Samples, beams, system prompts and a chat, each in the sizes that the configuration lists."""

    expectation = EXPECTATION
    place, runs_on, spreads = 170, "cpu", True
    failures = ()  # nothing here may fail
    configs = CONFIGS

    def cells(self) -> list[Row]:
        config = self.config
        forked = itertools.product(FORKED, DATA_SETS, config.widths)
        prompts = itertools.product(config.system_tokens, config.concurrency)
        return [
            *({"workload": name, "lengths": lengths.name, "width": width} for name, lengths, width in forked),
            *(
                {"workload": SYSTEM_PROMPT, "lengths": "ShareGPT", "system_tokens": tokens, "concurrency": concurrency}
                for tokens, concurrency in prompts
            ),
            {"workload": CHAT, "lengths": "ShareGPT"},
        ]

    def rows(self, cell: Row) -> list[Row]:
        return [cell | found for found in chat(self.config)] if cell["workload"] == CHAT else super().rows(cell)

    def measure(self, cell: Row) -> Row:
        if cell["workload"] == SYSTEM_PROMPT:
            return system_prompt(self.config, cell["system_tokens"], cell["concurrency"])
        (lengths,) = (each for each in DATA_SETS if each.name == cell["lengths"])
        low, high = PUBLISHED[cell["workload"], lengths.name]
        found = FORKED[cell["workload"]](self.config, lengths, cell["width"])
        return {**found, "published_low": low, "published_high": high}

    def show(self, rows: list[Row]) -> None:
        saved = {"saved_percent": "memory saved, %|.1f"}
        published = {"published_low": "published, %|.1f", "published_high": "to|.1f"}
        print_table(
            [row for row in rows if "width" in row],
            {"workload": "workload", "lengths": "lengths", "width": "width", **saved, **published,
             "copies_per_1000_tokens": "copies / 1000 tokens|.1f"},
            "Samples and beams",
        )  # fmt: skip
        print_table(
            [row for row in rows if "concurrency" in row],
            {"system_tokens": "system prompt|,", "concurrency": "requests at once", **saved},
            "A common system prompt",
        )
        chats = [row for row in rows if "turn" in row]
        print_table(chats, {"turn": "turn", "found_percent": "prompt found, %|.1f"}, "Multi-turn chat")

    def draw(self, rows: list[Row], path: Path) -> None:
        draw(rows, path)


EXPERIMENT = PrefixSharing()

if __name__ == "__main__":
    run_script(EXPERIMENT)

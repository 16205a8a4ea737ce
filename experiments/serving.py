"""How many requests does a fixed KV memory serve at once, and how fast, with and without paging?

The same load goes through the same engine, model and kernels under the same number of token slots. Contiguous
reservation gives every request a region for the longest text that is allowed, so that no more than slots / longest run
at once. Paging gives blocks as tokens come, by block size, and, with prefix sharing, one copy of what prompts begin
with alike. Lengths follow the Azure 2023 conversation trace, or any trace file; a part of each prompt is one of a few
system prompts. On a GPU time is measured. Without one a small random model runs, every answer is compared, and time is
counted in steps of the engine: what a step takes there says nothing about a GPU.
"""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

import cupaged as pg
from cupaged.bench.experiment import Experiment, Row, run_script
from cupaged.bench.report import (
    new_figure,
    positive,
    ratio,
    save_figure,
)
from cupaged.engine.weights import Checkpoint, ModelConfig, random_checkpoint, smollm2_or_random
from cupaged.memory.sampler import Trace, load_trace, sample_trace

CONTIGUOUS, PAGED, SHARED = "contiguous", "paged", "paged, prefixes shared"
WARM_UPS = (2, 12, 100)  # tokens of a prompt: prefill has a kernel for few new tokens a sequence, for more, for many
CLAIM = "The documents: 5 to 10 times as many requests at once. The vLLM paper: 2 to 4 times the throughput."
EXPECTATION = (
    "What to expect. A reservation for the longest text is mostly empty: requests at once grow by about the longest "
    "over the mean length. Throughput grows less, as a step of more sequences takes longer, and not at all once the "
    "batch is limited by something else than memory. Small blocks waste less, and share more of a prefix; the size "
    "matters little while blocks are short against a text. With more at once the first token comes sooner, as requests "
    "wait less, and the tokens behind it come at longer intervals."
)
SMALL = ModelConfig(
    num_layers=1, hidden_size=32, intermediate_size=32, vocab_size=211, num_heads=1, num_kv_heads=1, head_dim=32,
    max_tokens=1024,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The load, the memory, and what is swept.

    Parameters
    ----------
    requests : int
        Of the trace; all are there at the beginning unless `rate` is given.
    shorten : int
        Lengths of the trace are divided by this.
    longest : int
        Tokens that a request may have, prompt and answer: what contiguous reservation reserves. Longer ones are cut.
    slots : int
        Token slots of the KV memory.
    system_prompts, system_tokens : int
        Prompts begin with one of so many texts of so many tokens.
    block_sizes : tuple of int
    max_batch_tokens, max_num_seqs : int
        Of the scheduler.
    rate : float, optional
        Requests a second (a step without a GPU), as a Poisson process.
    """

    requests: int
    shorten: int
    longest: int
    slots: int
    system_prompts: int
    system_tokens: int
    block_sizes: tuple[int, ...]
    max_batch_tokens: int
    max_num_seqs: int
    rate: float | None = None


CONFIGS = {
    ("cuda", False): Config(256, 1, 4096, 65_536, 4, 256, (8, 16, 32, 64, 128), 2048, 256),
    ("cuda", True): Config(24, 16, 512, 2048, 2, 32, (16,), 256, 32),
    ("host", False): Config(96, 24, 256, 2048, 3, 24, (8, 16, 32, 64, 128), 512, 64),
    ("host", True): Config(12, 48, 96, 384, 2, 16, (8, 32), 64, 16),
}


@dataclass(frozen=True)
class Load:
    """Requests: their tokens, how many to generate, and when they come."""

    prompts: tuple[np.ndarray, ...]
    output_tokens: np.ndarray
    arrival: np.ndarray


class Serving(Experiment):
    """One load, served in each way."""

    expectation, claim, unit = EXPECTATION, CLAIM, "run"
    place, wants_quiet_cpu = 200, True
    configs = CONFIGS

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--trace", type=Path, default=None, help="a trace file, plain or .gz, instead of the sampled conversation"
        )
        parser.add_argument("--requests", type=positive(int), default=None, help="how many requests")
        parser.add_argument(
            "--block-sizes", type=positive(int), nargs="+", default=None,
            help="which (default: 8 to 128, fewer in a smoke run)",
        )  # fmt: skip
        parser.add_argument("--rate", type=positive(float), help="requests a second (default: all at the beginning)")

    def set_up(self) -> None:
        options, config = self.options, self.config
        sizes = tuple(options.block_sizes or config.block_sizes)
        requests = options.requests or config.requests
        self.config = replace(config, requests=requests, rate=options.rate, block_sizes=sizes)
        self.trace = trace_of(options.trace, requests)
        self.time_unit = "second" if self.backend == "cuda" else "step"
        self.answers: list[list[int]] = []

    def prepare(self) -> None:
        self.checkpoint, self.model = model_of(self.backend, self.smoke)
        self.load = load_of(self.trace, self.config, self.checkpoint.config.vocab_size)

    def go_on(self, rows: list[Row]) -> None:
        self.answers = next((row["_answers"] for row in rows if "_answers" in row), [])

    def cells(self) -> list[tuple[str, int]]:
        return [(CONTIGUOUS, 16), *product((PAGED, SHARED), self.config.block_sizes)]

    def what(self, cell: tuple[str, int]) -> Row:
        way, size = cell
        return {"way": way, "block_size": None if way == CONTIGUOUS else size}

    def measure(self, cell: tuple[str, int]) -> Row:
        first = not self.answers
        row = serve(self.checkpoint, self.backend, self.config, self.load, *cell, self.answers)
        return row | ({"_answers": self.answers} if first else {})

    def compare(self, rows: list[Row]) -> list[Row]:
        return [row | gains(row, rows[0]) for row in rows]

    def columns(self) -> dict[str, str]:
        return columns(self.time_unit)

    def title(self) -> str:
        return f"{len(self.trace)} requests to {self.model} in {self.config.slots} token slots"

    def notes(self, rows: list[Row]) -> Row:
        return {
            **super().notes(rows), "model": self.model, "trace": self.trace.name, "unit": self.time_unit,
            "claim": CLAIM,
        }  # fmt: skip

    def draw(self, rows: list[Row], path: Path) -> None:
        draw(rows, self.stamp, self.time_unit, path)


def columns(unit: str) -> dict[str, str]:
    """Return the table's columns."""
    return {
        "way": "way", "block_size": "block size", "at_once": "at once|.1f", "at_once_gain": "gain|.2f",
        "most_at_once": "most", "tokens_per_unit": f"tokens a {unit}|.2f", "throughput_gain": "gain|.2f",
        "first_token": f"first token, {unit}s|.3g", "first_token_p99": "p99|.3g",
        "between_tokens": f"between tokens, {unit}s|.3g", "between_tokens_p99": "p99|.3g",
        "preemptions": "preemptions", "occupancy": "occupancy|.3f", "hit_rate": "prefix hits|.2f", "status": "status",
    }  # fmt: skip


def trace_of(path: Path | None, requests: int) -> Trace:
    """Return the requests of a trace file that generate something, or sampled ones."""
    if path is None:
        return sample_trace(requests)
    trace = load_trace(path, limit=requests)
    trace = trace[trace.output_tokens > 0]
    if not len(trace):
        raise ValueError(f"{path}: expected a request that generates at least one token, got none")
    return trace


def model_of(backend: str, smoke: bool) -> tuple[Checkpoint, str]:
    """Return the model that answers, and what to call it."""
    if backend == "host" or smoke:
        return random_checkpoint(SMALL), "a small random model"
    return smollm2_or_random()


def load_of(trace: Trace, config: Config, vocab_size: int) -> Load:
    """Return a trace's requests as texts, shortened to what is allowed; all random but what prompts begin with."""
    random = np.random.default_rng(0)
    prompt_tokens = np.clip(trace.prompt_tokens // config.shorten, 1, config.longest - 1)
    output_tokens = np.clip(trace.output_tokens // config.shorten, 1, config.longest - prompt_tokens)
    begin = random.integers(vocab_size, size=(config.system_prompts, config.system_tokens))
    prompts = []
    for length, which in zip(prompt_tokens, random.integers(config.system_prompts, size=len(trace)), strict=True):
        own = random.integers(vocab_size, size=int(length))
        common = min(config.system_tokens, int(length) - 1)
        own[:common] = begin[which][:common]
        prompts.append(own.astype(np.int32))
    gaps = random.exponential(1 / config.rate, len(trace)) if config.rate else np.zeros(len(trace))
    return Load(tuple(prompts), output_tokens, np.cumsum(gaps) - gaps[0])


# --- serving ------------------------------------------------------------------------------------------------------


def serve(
    checkpoint: Checkpoint,
    backend: str,
    config: Config,
    load: Load,
    way: str,
    block_size: int,
    answers: list[list[int]],
) -> Row:
    """Serve the load and return what was seen; `answers` are those of the first way, which others must repeat."""
    at_once = min(config.max_num_seqs, config.slots // config.longest if way == CONTIGUOUS else config.max_num_seqs)
    llm = pg.LLM(
        checkpoint, backend=backend, num_blocks=config.slots // block_size, block_size=block_size,
        max_batch_tokens=config.max_batch_tokens, max_num_seqs=at_once, prefix_caching=way == SHARED,
    )  # fmt: skip
    if backend == "cuda":  # compile and capture outside the clock
        llm.prepare(at_once, config.longest)
        for length in WARM_UPS:
            llm.generate([np.zeros(length, np.int32)], pg.SamplingParams(2, ignore_end=True))
    submitted: dict[int, int] = {}
    times: dict[int, list[float]] = {}
    running, seconds, occupied, waits = [], [], [], []
    clock, coming, most = 0.0, 0, 0
    while coming < len(load.prompts) or llm.unfinished:
        if not llm.unfinished:
            clock = max(clock, float(load.arrival[coming]))
        while coming < len(load.prompts) and load.arrival[coming] <= clock:
            params = pg.SamplingParams(int(load.output_tokens[coming]), ignore_end=True)
            submitted[llm.submit(load.prompts[coming], params)] = coming
            coming += 1
        report = llm.step(report=True)
        assert report is not None
        took = report.seconds if backend == "cuda" else 1.0
        clock += took
        for request_id in report.new_tokens:
            times.setdefault(submitted[request_id], []).append(clock)
        seconds.append(took)
        ran = {request_id for request_id, _, _ in report.work} | set(report.running)
        running.append(len(ran))
        most = max(most, len(ran))
        waits.append(bool(report.waiting))
        stored = sum(report.tokens_stored.values()) / max(1, len(report.running) * config.longest)
        occupied.append(stored if way == CONTIGUOUS else llm.stats()["token_occupancy"])
    done = {submitted[request_id]: llm.completion(request_id) for request_id in submitted}
    said = [done[i].tokens.tolist() for i in range(len(load.prompts))]
    status = verdict_on(llm, said, load, answers, exact=backend == "host")
    firsts = np.array([times[i][0] - load.arrival[i] for i in range(len(said))])
    between = np.concatenate([np.diff(times[i]) for i in range(len(said))])
    stats, weights = llm.stats(), np.array(seconds)
    loaded = weights * np.array(waits) if any(waits) else weights  # while memory is what requests wait for
    return {
        "status": status,
        "at_once": float(np.average(running, weights=loaded)),
        "most_at_once": most,
        "limit_at_once": at_once,
        "tokens_per_unit": sum(map(len, said)) / float(weights.sum()),
        "first_token": float(firsts.mean()),
        "first_token_p99": float(np.percentile(firsts, 99)),
        "between_tokens": float(between.mean()) if between.size else None,
        "between_tokens_p99": float(np.percentile(between, 99)) if between.size else None,
        "preemptions": stats["preemptions"],
        "occupancy": float(np.average(occupied, weights=loaded)),
        "hit_rate": stats["prefix_hit_rate"],
        "steps": len(seconds),
    }


def verdict_on(llm: pg.LLM, said: list[list[int]], load: Load, answers: list[list[int]], *, exact: bool) -> str:
    """Return "ok", or what is wrong: a token too few, another answer than the first way gave, a block left behind.

    In half precision a batch of another shape may round a choice the other way, so answers are compared in float32.
    """
    if [len(tokens) for tokens in said] != load.output_tokens.tolist():
        return "wrong: a request did not get all of its tokens"
    if llm.manager.gpu.num_available != llm.manager.gpu.num_blocks:
        return "wrong: blocks are left behind"
    if not answers:
        answers.extend(said)
    if exact and said != answers:
        return "wrong: the answers differ from those of contiguous reservation"
    return "ok"


def gains(row: Row, base: Row) -> Row:
    """Return how much more a way serves than contiguous reservation."""
    if "at_once" not in row or "at_once" not in base:
        return {}
    return {
        "at_once_gain": ratio(row["at_once"], base["at_once"]),
        "throughput_gain": ratio(row["tokens_per_unit"], base["tokens_per_unit"]),
    }


# --- reporting ----------------------------------------------------------------------------------------------------


def conclusion(rows: list[Row]) -> str:
    """Return what was found, in a sentence a way."""
    ok = [row for row in rows if row["status"] == "ok"]
    if not ok or ok[0]["way"] != CONTIGUOUS:
        return "Found: contiguous reservation did not run, so there is nothing to compare with."
    text = f"Found: contiguous reservation serves {ok[0]['at_once']:.1f} requests at once."
    for way in (PAGED, SHARED):
        group = [row for row in ok if row["way"] == way and row["at_once_gain"] and row["throughput_gain"]]
        if group:
            best = max(group, key=lambda row: row["tokens_per_unit"])
            text += (
                f" {way.capitalize()}: up to {max(row['at_once_gain'] for row in group):.1f} times as many, and "
                f"{best['throughput_gain']:.1f} times the throughput (block size {best['block_size']})."
            )
    return text


def draw(rows: list[Row], stamp: dict[str, str], unit: str, path: Path) -> None:
    """Plot requests at once and throughput by block size."""
    figure, axes = new_figure(2)
    base = rows[0]
    panels = (("at_once", "requests at once, on average"), ("tokens_per_unit", f"tokens generated a {unit}"))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for way in (PAGED, SHARED):
            group = [row for row in rows if row["way"] == way and key in row]
            axis.plot([row["block_size"] for row in group], [row[key] for row in group], "o-", label=way)
        if key in base:
            axis.axhline(base[key], color="black", linestyle="--", label=CONTIGUOUS)
        axis.set(xlabel="block size", ylabel=label, xscale="log", ylim=(0, None))
        axis.set_xticks([row["block_size"] for row in rows if row["way"] == PAGED])
        axis.get_xaxis().set_major_formatter("{x:.0f}")
        axis.minorticks_off()
    axes[0].legend()
    figure.suptitle(f"Serving under a fixed KV memory, {stamp['device']}")
    save_figure(figure, path)


EXPERIMENT = Serving()

if __name__ == "__main__":
    run_script(EXPERIMENT)

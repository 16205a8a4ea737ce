"""What requests ask of a memory: when they come, how long their prompts are, how much they generate.

A `Trace` holds that as three arrays. It comes from a published trace file (`load_trace`) or from a seeded sampler that
follows the length distributions of one (`sample_trace`), so that every experiment runs where no trace is at hand.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import reprlib
import sys
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, islice, zip_longest
from os import PathLike
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

import numpy as np
import numpy.typing as npt

from cupaged.memory.allocator import whole_number

__all__ = ["FORMS", "WORKLOADS", "Trace", "TraceForm", "Workload", "load_trace", "sample_trace"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
MOST_TOKENS = 2**31 - 1
LONGEST = 1e300
GZIP = b"\x1f\x8b"


# --- a trace --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival, one array a property; the arrays are read-only.

    Parameters
    ----------
    arrival : float64 [num_requests]
        Seconds, never falling.
    prompt_tokens, output_tokens : int64 [num_requests]
        Tokens of the prompt and generated tokens, together at most 2**31 - 1. A request that generated none failed:
        published traces keep such requests, and BurstGPT also writes 0 for their prompts. Any other prompt has at least
        1 token.
    name : str
        What a table calls this trace.
    """

    arrival: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    name: str = "trace"

    def __post_init__(self) -> None:
        arrival = _column("arrival", self.arrival, np.float64)
        prompt = _column("prompt_tokens", self.prompt_tokens, np.int64)
        output = _column("output_tokens", self.output_tokens, np.int64)
        if not len(arrival) == len(prompt) == len(output):
            raise ValueError(
                "arrival, prompt_tokens and output_tokens must have equal lengths, "
                f"got {len(arrival)}, {len(prompt)} and {len(output)}"
            )
        if not np.isfinite(arrival).all() or (arrival[1:] < arrival[:-1]).any():
            raise ValueError("arrival must be finite seconds that never fall")
        if (abs(arrival) > LONGEST).any():  # so that the difference of two is finite
            raise ValueError(f"arrival must be at most {LONGEST:g} seconds, got {abs(arrival).max()}")
        for name, column, least in (
            ("prompt_tokens", prompt, 0),
            ("prompt_tokens", prompt[output > 0], 1),
            ("output_tokens", output, 0),
        ):
            if (column < least).any():
                raise ValueError(f"{name} must be at least {least} everywhere, got {column.min()}")
        if (prompt > MOST_TOKENS - output).any():
            longest = int(np.argmax(prompt > MOST_TOKENS - output))
            raise ValueError(
                f"prompt_tokens and output_tokens must be at most {MOST_TOKENS} together, "
                f"got {prompt[longest]} and {output[longest]} for request {longest}"
            )
        for name, column in (("arrival", arrival), ("prompt_tokens", prompt), ("output_tokens", output)):
            column.setflags(write=False)
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.arrival)

    def __getitem__(self, which: slice | npt.NDArray[Any]) -> Trace:
        """Return the requests that a slice, a mask or rising indices select, as a trace."""
        if not isinstance(which, slice | np.ndarray):
            raise TypeError(f"index must be a slice, a mask or indices, got {type(which).__name__}")
        return Trace(self.arrival[which], self.prompt_tokens[which], self.output_tokens[which], self.name)

    @property
    def total_tokens(self) -> IntArray:
        """Tokens that each request holds in the end, int64 [num_requests]."""
        return self.prompt_tokens + self.output_tokens

    def token_steps(self) -> IntArray:
        """Return each request's tokens summed over its decode steps, int64 [num_requests].

        Step k of a request (k = 0 ... output - 1) begins with prompt + k tokens in the cache.
        """
        return _triangle(self.total_tokens - 1) - _triangle(self.prompt_tokens - 1)

    def slot_steps(self, block_size: int) -> IntArray:
        """Return the slots of the blocks behind `token_steps`, summed alike, int64 [num_requests]."""
        block_size = whole_number("block_size", block_size, at_least=1)
        if block_size > MOST_TOKENS:
            raise ValueError(f"block_size must be at most {MOST_TOKENS}, got {block_size}")
        return _block_triangle(self.total_tokens - 1, block_size) - _block_triangle(self.prompt_tokens - 1, block_size)

    def paged_occupancy(self, block_size: int) -> float:
        """Return the share of allocated slots that hold tokens if these requests are paged, averaged over decode steps.

        It follows from the lengths alone, without a replay: paging wastes a part of each request's last block only.

        Raises
        ------
        ValueError
            No request generates a token, so that there is no decode step.
        """
        slots = exact_sum(self.slot_steps(block_size))
        if not slots:
            raise ValueError(f"trace must hold a request that generates at least one token, got {len(self)} without")
        return exact_sum(self.token_steps()) / slots


def exact_sum(numbers: IntArray) -> int:
    """Return the sum of int64 numbers, which may be more than an int64 holds."""
    return sum(numbers.tolist())


def _column(name: str, values: Any, dtype: type) -> npt.NDArray[Any]:
    column = np.array(values)
    if column.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got {column.ndim}")
    if not np.can_cast(column.dtype, dtype, "same_kind") and column.size:
        raise TypeError(f"{name} must be {np.dtype(dtype).name}, got {column.dtype}")
    return column.astype(dtype)


def _triangle(n: IntArray) -> IntArray:
    """1 + 2 + ... + n."""
    return n * (n + 1) // 2


def _block_triangle(n: IntArray, block_size: int) -> IntArray:
    """Slots of ceil(1 / block_size) + ... + ceil(n / block_size) blocks."""
    blocks, rest = np.divmod(n, block_size)
    return block_size * (block_size * _triangle(blocks) + rest * (blocks + 1))


# --- the sampler ----------------------------------------------------------------------------------


class Workload(NamedTuple):
    """Length distributions of a published trace: the percentiles in `PERCENTILES`, its size and its mean rate."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    num_requests: int
    requests_per_second: float


PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)

# Computed from the Azure LLM inference traces of 2023 (CC-BY): Patel et al., "Splitwise: Efficient Generative LLM
# Inference Using Phase Splitting", ISCA 2024.
WORKLOADS: Mapping[str, Workload] = {
    "conversation": Workload(
        prompt=(2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 14050),
        output=(7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 1000),
        num_requests=19_366,
        requests_per_second=5.53,
    ),
    "code": Workload(
        prompt=(3, 17, 75, 147, 578, 1469, 2744, 5187, 7303, 7436, 7437),
        output=(6, 6, 6, 7, 9, 13, 24, 55, 90, 251, 1899),
        num_requests=8_819,
        requests_per_second=2.57,
    ),
}


def sample_trace(
    num_requests: int, workload: str = "conversation", *, requests_per_second: float | None = None, seed: int = 0
) -> Trace:
    """Draw a trace whose lengths follow a published one.

    Lengths are drawn between the published percentiles along straight lines in (normal quantile, log length): each
    stretch is a piece of a log-normal, so that the tail beyond the last percentiles stays thin. The extremes stand
    where the smallest and the largest of the trace's own number of requests would. Mean lengths are then within 1.1 %
    of the traces' own, where straight lines in (percentile, length) miss by up to 30 %. Prompt and output are drawn
    independently (in the traces they correlate by -0.11 and 0.00); arrivals are a Poisson process.

    Parameters
    ----------
    num_requests : int
        At least 1.
    workload : {"conversation", "code"}
        Which of `WORKLOADS` to follow.
    requests_per_second : float, optional
        Mean arrival rate; the published trace's own by default.
    seed : int
        The same seed gives the same trace.
    """
    num_requests = whole_number("num_requests", num_requests, at_least=1)
    if not isinstance(workload, str) or workload not in WORKLOADS:
        raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {workload!r}")
    source = WORKLOADS[workload]
    rate = source.requests_per_second if requests_per_second is None else requests_per_second
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"requests_per_second must be a positive number, got {requests_per_second!r}")
    random = np.random.default_rng(whole_number("seed", seed, at_least=0))
    gaps = random.exponential(1 / rate, num_requests)
    with np.errstate(over="ignore", invalid="ignore"):
        arrival = np.cumsum(gaps) - gaps[0]
    if not np.isfinite(arrival).all():
        raise ValueError(f"requests_per_second must be such that arrivals are finite seconds, got {rate!r}")
    return Trace(
        arrival=arrival,
        prompt_tokens=_draw_lengths(random, source.prompt, source.num_requests, num_requests),
        output_tokens=_draw_lengths(random, source.output, source.num_requests, num_requests),
        name=f"sampled {workload}",
    )


def _draw_lengths(
    random: np.random.Generator, percentiles: tuple[int, ...], population: int, num_requests: int
) -> IntArray:
    extreme = 0.5 / population
    levels = np.clip(np.array(PERCENTILES) / 100, extreme, 1 - extreme)
    quantiles = [NormalDist().inv_cdf(level) for level in levels]
    log_lengths = np.interp(random.standard_normal(num_requests), quantiles, np.log(percentiles))
    return np.rint(np.exp(log_lengths)).astype(np.int64)


# --- trace files ----------------------------------------------------------------------------------


class TraceForm(NamedTuple):
    """The columns of a published trace's files, and how to read an arrival as seconds."""

    arrival: str
    prompt: str
    output: str
    seconds: Callable[[Any], float]


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 80


class _Malformed(ValueError):
    """What was expected of a value; the loader adds the file, the line, the column and what was found."""


def _seconds(value: Any) -> float:
    try:
        foreign = isinstance(value, str) and ("_" in value or not value.strip().isascii())
        seconds = math.nan if isinstance(value, bool) or foreign else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise _Malformed("a finite number")
    if abs(seconds) > LONGEST:
        raise _Malformed(f"a number of at most {LONGEST:g}")
    return seconds


def _milliseconds(value: Any) -> float:
    return _seconds(value) / 1000


def _date(value: Any) -> float:
    try:
        moment = datetime.fromisoformat(value if not isinstance(value, str) or value.isascii() else "")
    except (TypeError, ValueError, OverflowError):
        raise _Malformed("a date and time such as 2023-11-16 18:15:46.68") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _tokens(value: Any, least: int) -> int:
    text = str(value).strip() if type(value) in (int, str) else ""
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and least <= int(text) <= MOST_TOKENS):
        raise _Malformed(f"a whole number of tokens from {least} to {MOST_TOKENS}")
    return int(text)


FORMS: Mapping[str, TraceForm] = {
    # The Azure LLM inference traces of 2023 and 2024; Stojkovic et al., HPCA 2025, for the second.
    "azure": TraceForm("TIMESTAMP", "ContextTokens", "GeneratedTokens", _date),
    # BurstGPT (Wang et al., arXiv 2401.17644).
    "burstgpt": TraceForm("Timestamp", "Request tokens", "Response tokens", _seconds),
    # Mooncake (Qin et al., FAST 2025): JSON Lines, arrivals in milliseconds.
    "mooncake": TraceForm("timestamp", "input_length", "output_length", _milliseconds),
    # The form that the Vidur simulator reads (Agrawal et al., MLSys 2024).
    "vidur": TraceForm("arrived_at", "num_prefill_tokens", "num_decode_tokens", _seconds),
}


def load_trace(path: str | PathLike[str], *, limit: int | None = None) -> Trace:
    """Read a trace file; its form (`FORMS`) is recognised by its column names.

    Comma-separated values with a header line, or one JSON object a line (a JSON array is refused), in UTF-8, plain or
    compressed by gzip. Blank lines and other columns are passed over. A date without an offset is in UTC. Requests are
    put in order of arrival (those at the same moment stay in the file's order), and the first arrives at 0. Failed
    requests, which generated no token, are kept: ``trace[trace.output_tokens > 0]`` leaves them out.

    Parameters
    ----------
    path : path-like
        The file.
    limit : int, optional
        Read no more than this many requests from the file's beginning.

    Raises
    ------
    ValueError
        The file is malformed: the message names file, line and column, what was expected and what was found.
    """
    if limit is not None:
        limit = min(whole_number("limit", limit, at_least=1), sys.maxsize)
    path = Path(path)
    requests: list[tuple[float, int, int]] = []
    with open(path, "rb") as file, _as_text(file) as text:
        form: TraceForm | None = None
        for line, record in islice(_records(path, text), limit):
            form = form or _form_of(path, line, record)
            requests.append(_request(path, line, record, form))
    if not requests:
        raise ValueError(f"{path}: expected a header and at least one request, got none")
    arrivals, prompts, outputs = zip(*requests, strict=True)
    arrival = np.array(arrivals)
    order = np.argsort(arrival, kind="stable")
    prompt, output = (np.array(column, np.int64)[order] for column in (prompts, outputs))
    name = Path(path.stem).stem if path.suffix == ".gz" else path.stem
    return Trace(arrival[order] - arrival[order[0]], prompt, output, name)


def _request(path: Path, line: int, record: Mapping[str, Any], form: TraceForm) -> tuple[float, int, int]:
    arrival = _read(path, line, record, form.arrival, form.seconds)
    output = _read(path, line, record, form.output, lambda value: _tokens(value, 0))
    prompt = _read(path, line, record, form.prompt, lambda value: _tokens(value, min(output, 1)))
    if prompt + output > MOST_TOKENS:
        raise ValueError(f"{path}, line {line}: expected at most {MOST_TOKENS} tokens together, got {prompt + output}")
    return arrival, prompt, output


def _records(path: Path, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, record) of either kind of file; a JSON Lines file begins with a brace."""
    lines = enumerate(_lines(path, file), start=1)
    line, first = next(((line, text) for line, text in lines if text.strip()), (1, ""))
    if "\0" in first:
        raise ValueError(f"{path}, line {line}: expected text in UTF-8, got a byte of 0: another encoding, or no text")
    if first.lstrip().startswith("["):
        raise ValueError(f"{path}, line {line}: expected one JSON object a line, got a JSON array")
    rest = chain([first], (text for _, text in lines))
    read = _json_records if first.lstrip().startswith("{") else _csv_records
    return read(path, rest, line)


def _as_text(file: BinaryIO) -> TextIO:
    """Return a file's text with its ends of lines; what is no UTF-8 becomes a replacement character."""
    zipped = cast(io.BufferedReader, file).peek(len(GZIP)).startswith(GZIP)
    plain = gzip.GzipFile(fileobj=file) if zipped else file
    return io.TextIOWrapper(plain, encoding="utf-8-sig", errors="replace", newline="")


def _lines(path: Path, text: TextIO) -> Iterator[str]:
    """Yield the lines of a file, with their ends."""
    line = 0
    try:
        for content in text:
            line += 1
            yield content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, line {line + 1}: the gzip file is damaged: {error}") from None


def _csv_records(path: Path, lines: Iterable[str], first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = _csv_rows(path, lines, first)
    names = [name.strip() for name in next(rows, (first, []))[1]]
    for column in (column for form in FORMS.values() for column in form[:3]):
        if names.count(column) > 1:
            raise ValueError(f"{path}, line {first}: expected one column {column!r}, got {names.count(column)}")
    for line, values in rows:
        if len(values) > len(names):
            raise ValueError(f"{path}, line {line}: expected {len(names)} columns, got {len(values)}")
        yield line, dict(zip_longest(names, values))


def _csv_rows(path: Path, lines: Iterable[str], first: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank, each with the line on which it begins."""
    rows = csv.reader(lines, strict=True)
    while True:
        line = first + rows.line_num
        try:
            values = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
        if values is None:
            return
        if len(values) > 1 or "".join(values).strip():
            yield line, values


def _json_records(path: Path, lines: Iterable[str], first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(lines, start=first):
        if not text.strip():
            continue
        try:
            record = json.loads(text.rstrip(), object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line}, column {error.colno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # a name twice, too many digits, nested too deep
            raise ValueError(f"{path}, line {line}: not JSON that can be read: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {line}: expected a JSON object, got {type(record).__name__}")
        yield line, record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        ((name, count),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"expected one value of {name!r}, got {count}")
    return record


def _form_of(path: Path, line: int, record: Mapping[str, Any]) -> TraceForm:
    forms = {name: form for name, form in FORMS.items() if record.keys() >= set(form[:3])}
    if len(forms) == 1:
        return next(iter(forms.values()))
    known = "; ".join(f"{name} ({', '.join(form[:3])})" for name, form in FORMS.items())
    got = f"those of {' and '.join(forms)}" if forms else textwrap.shorten(", ".join(record), 300)
    raise ValueError(f"{path}, line {line}: expected the columns of one of {known}; got {got}")


def _read(path: Path, line: int, record: Mapping[str, Any], column: str, parse: Callable[[Any], Any]) -> Any:
    value = record.get(column)
    try:
        return parse(value)
    except _Malformed as expected:
        got = "nothing" if value in (None, "") else SHORT.repr(value)
        raise ValueError(f"{path}, line {line}, column {column!r}: expected {expected}, got {got}") from None

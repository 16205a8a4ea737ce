"""Nsight Compute from Python: run a program under ``ncu`` and return each launch's counters."""

from __future__ import annotations

import csv
import math
import re
import shutil
import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from cupaged.errors import BackendUnavailableError

__all__ = ["Launch", "parse_ncu", "run_ncu"]

# What ncu puts before a unit's name; its counts of bytes go by 1000.
PREFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
KEYS = ("ID", "Kernel Name")
METRIC = "__"  # in the name of every metric, and of no other column
HEAD = re.compile(r'"ID",(?=.*"Kernel Name")')
NUMBER = re.compile(r"[-+]?((\d+|\d{1,3}(,\d{3})+)(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
LIKE_A_NUMBER = re.compile(r"[-+\u2212]?\s*[.,]?\d")  # the beginning of one; a digit of any alphabet


@dataclass(frozen=True)
class Launch:
    """One kernel launch and what ncu counted: bytes in bytes, times in seconds, rates too; the rest as ncu has it."""

    kernel: str
    values: dict[str, float]


def run_ncu(metrics: Sequence[str], kernels: Sequence[str], command: Sequence[str], timeout: float = 600) -> str:
    """Run `command` under ncu and return its standard output: the counters as CSV among what `command` printed.

    Parameters
    ----------
    metrics : sequence of str
        Names as ``ncu --query-metrics`` lists them, with ``.sum`` and the like.
    kernels : sequence of str
        Kernels to count; others run uncounted.
    command : sequence of str
        The program and its arguments.
    timeout : float
        Seconds.

    Raises
    ------
    BackendUnavailableError
        If there is no ncu, or the driver lets only administrators count.
    RuntimeError
        If ncu failed, with the end of what it said, or took too long.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise BackendUnavailableError(
            "ncu, Nsight Compute's command line, is not on PATH: it comes with the CUDA toolkit "
            "(Debian, Ubuntu with NVIDIA's packages: apt-get install nsight-compute)"
        )
    options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    options += ["--metrics", ",".join(metrics), "--kernel-name-base", "function"]
    options += ["--kernel-name", f"regex:^({'|'.join(kernels)})$"]
    try:
        answer = subprocess.run(
            [ncu, *options, *command], capture_output=True, encoding="utf-8", errors="replace", timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"ncu failed: it had not ended after {timeout:g} s") from None
    said = f"{answer.stdout[-2000:]}\n{answer.stderr[-2000:]}"
    if "ERR_NVGPUCTRPERM" in said:
        raise BackendUnavailableError(
            "the driver lets only administrators read the GPU's counters: run as root, or load the nvidia module with "
            "NVreg_RestrictProfilingToAdminUsers=0"
        )
    if answer.returncode != 0:
        raise RuntimeError(f"ncu failed:\n{said}")
    return answer.stdout


def parse_ncu(text: str) -> list[Launch]:
    """Return the launches in what ``ncu --csv --page raw`` printed, in order.

    A line with columns ID and Kernel Name holds the heads, the one below it, without an ID, the units; there may be
    several such tables. Lines of another form are the program's own. What ncu could not count is left out of a launch's
    values.

    Raises
    ------
    ValueError
        The table is another one than ``--page raw`` prints: a column comes twice, a row has another number of fields
        than the heads, or a value is a number in a form that ncu does not use.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    launches: list[Launch] = []
    heads: list[str] = []
    units: dict[str, str] = {}
    others = []  # what looks like a table and is not
    for number, line in enumerate(text.split("\n"), start=1):
        head = re.search(HEAD, line)
        if head:  # the program may have left its last line without an end
            heads, units = _fields(line[head.start() :]), {}
            if not any(METRIC in name for name in heads):
                raise ValueError(f"text must be what ncu --csv --page raw prints, with metrics as columns; got {heads}")
            twice = [name for name in heads if heads.count(name) > 1 and (METRIC in name or name in KEYS)]
            if twice:
                raise ValueError(f"line {number} of what ncu printed: expected each column once, got {twice[0]} again")
            continue
        fields = _fields(line) if line.startswith('"') else []
        others += [fields] if len(fields) > 1 and not heads else []
        if not heads:
            continue
        if len(fields) != len(heads):
            if _is_torn(fields, heads):
                raise ValueError(
                    f"line {number} of what ncu printed: expected {len(heads)} fields as the heads, got {len(fields)}"
                )
            continue
        row = dict(zip(heads, fields, strict=True))
        if not row["ID"] and not row["Kernel Name"]:
            units = row
        elif _is_id(row["ID"]):
            launches.append(_launch(row, units, number))
    if others and not heads:
        raise ValueError(
            "text must be what ncu --csv --page raw prints, with columns ID and Kernel Name; "
            f"got {textwrap.shorten(str(others[0]), 200)}"
        )
    return launches


def _fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r")]), [])
    except csv.Error:  # of the program's own: a line of any length, with any character
        return []


def _is_id(text: str) -> bool:
    return text.replace(",", "").isdecimal()


def _is_torn(fields: list[str], heads: list[str]) -> bool:
    """Return whether fields of another number than the heads are ncu's all the same: an ID and a kernel, or units."""
    identity, kernel = (fields[heads.index(key)] if heads.index(key) < len(fields) else None for key in KEYS)
    if identity is None or kernel is None:
        return False
    if not identity:
        return not kernel
    return _is_id(identity) and bool(kernel) and not LIKE_A_NUMBER.match(kernel)


def _launch(row: dict[str, str], units: dict[str, str], line: int) -> Launch:
    values = {}
    for name, text in row.items():
        if METRIC in name:
            try:
                number = _number(text.strip())
            except ValueError as error:
                raise ValueError(f"line {line} of what ncu printed, {name}: {error}") from None
            if number is not None:
                values[name] = number * _factor(units.get(name, ""))
    return Launch(_function(row["Kernel Name"]), values)


def _function(name: str) -> str:
    """Return a kernel's name without its arguments, if ncu gave them: the last parentheses, which may hold others."""
    if not name.endswith(")"):
        return name
    depth = 0
    for place in reversed(range(len(name))):
        depth += {")": 1, "(": -1}.get(name[place], 0)
        if not depth:
            return name[:place]
    return name


def _number(text: str) -> float | None:
    """Return a number; None of what is none, such as n/a."""
    if NUMBER.fullmatch(text):
        number = float(text.replace(",", ""))
        return number if math.isfinite(number) else None
    if LIKE_A_NUMBER.match(text):
        raise ValueError(f"expected a number such as 1,234.5, got {text!r}")
    return None


def _factor(unit: str) -> float:
    """Return what a value in ncu's unit is multiplied by to be in bytes or seconds, or in a quotient of such."""
    above, *below = unit.split("/")
    factor = _prefix(above)
    for part in below:
        factor /= _prefix(part)
    return factor


def _prefix(unit: str) -> float:
    for name in ("byte", "second", "s"):
        prefix = unit.removesuffix(name)
        if unit.endswith(name) and prefix in PREFIXES:
            return PREFIXES[prefix]
    return 1.0

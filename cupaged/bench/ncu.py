"""Nsight Compute from Python: run a program under ``ncu`` and return each launch's counters."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from cupaged.errors import BackendUnavailableError

__all__ = ["Launch", "parse_ncu", "run_ncu"]

# What ncu puts before a unit's name; its counts of bytes go by 1000.
PREFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Launch:
    """One kernel launch and what ncu counted: bytes in bytes, times in seconds, the rest as ncu gives it."""

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
        If ncu failed, with the end of what it said.
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
    answer = subprocess.run([ncu, *options, *command], capture_output=True, text=True, timeout=timeout)
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

    The first quoted line holds the heads, the second the units; other lines are the program's own. What ncu could not
    count is left out of a launch's values.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.DictReader(io.StringIO("\n".join(lines))))
    if not table:
        return []
    if not {"ID", "Kernel Name"} <= table[0].keys():
        raise ValueError(
            f"text must be what ncu --csv --page raw prints, with columns ID and Kernel Name; got {list(table[0])[:6]}"
        )
    units = table.pop(0) if not table[0]["ID"] else {}
    launches = []
    for row in table:
        values = {}
        for name, value in row.items():
            number = _number(value) if "__" in name else None
            if number is not None:
                values[name] = number * _factor(units.get(name) or "")
        launches.append(Launch(row["Kernel Name"].split("(")[0], values))
    return launches


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None  # n/a


def _factor(unit: str) -> float:
    """Return what a value in ncu's unit is multiplied by to be in bytes or seconds."""
    for name in ("byte", "second", "s"):
        prefix = unit.removesuffix(name)
        if unit.endswith(name) and prefix in PREFIXES:
            return PREFIXES[prefix]
    return 1.0

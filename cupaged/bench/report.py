"""How an experiment reports: a command line, a machine stamp, CSV and JSON files, a table, a picture."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from cupaged.errors import BackendUnavailableError, KernelBuildError, UnsupportedError

__all__ = [
    "COULD_NOT_RUN",
    "argument_parser",
    "device_folder",
    "machine_stamp",
    "measured_row",
    "new_figure",
    "positive",
    "print_table",
    "ratio",
    "result_folder",
    "run_experiment",
    "save_figure",
    "write_results",
]

Row = Mapping[str, Any]
FAILURES = (RuntimeError, ValueError, MemoryError)
FOLDERS = re.compile(r"(?<![\w.:/])/(?:[\w.+~-]+/)+(?=\w)")  # of an absolute path
COULD_NOT_RUN = 69  # EX_UNAVAILABLE: the status of an experiment that something on the machine kept from running
SOURCE_TREE = Path(__file__).resolve().parents[2]
console = Console(highlight=False, markup=False, emoji=False)  # brackets and colons are printed as they are


def argument_parser(question: str, *, backends: bool = True) -> argparse.ArgumentParser:
    """Return the command line that every experiment shares; `question` is what ``--help`` opens with."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest run that exercises every step (for CI)")
    parser.add_argument("--out", type=Path, default=None, help="folder for CSV, JSON and PNG (default: out/<device>)")
    if backends:
        parser.add_argument(
            "--backend", choices=("cuda", "host"), default=None, help="where kernels run (default: the best here)"
        )
    return parser


def positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """Return the `type` of a command line's argument that is a whole number of at least 1, or a number above 0."""
    expected = "a whole number of at least 1" if kind is int else "a finite number above 0"

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = kind(0)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return number

    return parse


def run_experiment(main: Callable[[], int]) -> NoReturn:
    """Run an experiment's `main` and exit; what a user can put right is one sentence, not a traceback."""
    try:
        status = main()
    except (BackendUnavailableError, UnsupportedError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = COULD_NOT_RUN
    except (KernelBuildError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 1
    raise SystemExit(status)


def result_folder(stamp: Mapping[str, str], out: Path | None) -> Path:
    """Return, and create, the folder that an experiment writes to."""
    folder = out if out is not None else Path("out") / device_folder(stamp)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def machine_stamp(backend: str) -> dict[str, str]:
    """Return what a reader must know to trust a number: device, versions, commit, date.

    Parameters
    ----------
    backend : {"cuda", "host", "cpu"}
        What did the measured work; "cpu" is plain Python and NumPy, "host" the host build of the kernels.
    """
    stamp = {
        "backend": backend,
        "device": _cpu_name(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    if backend == "cuda":
        stamp |= _gpu_stamp()
    return stamp


def device_folder(stamp: Mapping[str, str]) -> str:
    """Return the folder name under results/ for a stamp's device: short, lower case, safe in a path."""
    if stamp["backend"] != "cuda":
        return "cpu"
    name = stamp["device"].lower().replace("nvidia", "").strip()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def measured_row(
    what: Row, measure: Callable[[], Row], errors: tuple[type[Exception], ...] = FAILURES
) -> dict[str, Any]:
    """Return a row: `what` was measured and what `measure` found, or, if it raises one of `errors`, that it failed.

    It has also failed if a number that it found is NaN or infinite. Of a path in an error's message the file's name is
    left: folders are the machine's own.
    """
    try:
        found = measure()
    except errors as error:
        text = " ".join(FOLDERS.sub("", str(error)).split()) or type(error).__name__
        return {**what, "status": f"failed: {text[:300]}"}
    endless = [f"{key} is {number}" for key, value in found.items() for number in _not_finite(value)]
    return {**what, **found} if not endless else {**what, "status": f"failed: {', '.join(endless)}"[:300]}


def ratio(part: float, whole: float) -> float | None:
    """Return ``part / whole``; None, which is written as null, where there is nothing to divide by."""
    return part / whole if whole else None


def write_results(rows: Sequence[Row], stamp: Mapping[str, str], name: str, out: Path | None, **notes: Any) -> Path:
    """Write ``<name>.csv`` and ``<name>.json`` (rows, stamp and `notes`) and return their folder.

    Both hold the same values: None is an empty cell and null.

    Raises
    ------
    ValueError, TypeError
        A number is NaN or infinite, or a value has no form in JSON; the message names its place. Nothing is written.
    """
    plain = [
        {key: _plain(value, f"{name}, row {number}, column {key!r}") for key, value in row.items()}
        for number, row in enumerate(rows, start=1)
    ]
    said = {key: _plain(value, f"{name}, {key}") for key, value in notes.items()}
    table = io.StringIO()
    columns = list(dict.fromkeys(key for row in plain for key in row))
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    document = {"experiment": name, "stamp": dict(stamp), **said, "rows": plain}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    folder = result_folder(stamp, out)
    for suffix, content in (("csv", table.getvalue()), ("json", text + "\n")):
        # a byte of a file's name that is no UTF-8 is escaped as JSON does
        (folder / f"{name}.{suffix}").write_text(content, encoding="utf-8", errors="backslashreplace", newline="")
    return folder


def print_table(rows: Iterable[Row], columns: Mapping[str, str], title: str) -> None:
    """Print `rows` as a terminal table; `columns` maps a row's key to ``"heading"`` or ``"heading|format"``."""
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    heads = {key: ([*spec.split("|"), ""])[:2] for key, spec in columns.items()}
    rows = list(rows)
    for key, (heading, _) in heads.items():
        numeric = all(isinstance(row.get(key), int | float) for row in rows if row.get(key) is not None)
        table.add_column(heading, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(key), spec) for key, (_, spec) in heads.items()))
    console.print(table)


def new_figure(columns: int = 1, rows: int = 1, *, width: float = 10.0, height: float = 4.5) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, drawn without a display and sized for a README."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.3, "axes.axisbelow": True})  # fmt: skip
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", dpi=130)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG and close it."""
    import matplotlib.pyplot as plt

    figure.savefig(path)
    plt.close(figure)


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return "–"
    return format(value, spec) if spec and isinstance(value, int | float) else str(value)


def _plain(value: Any, where: str) -> Any:
    """Return a value as JSON knows it; `where` names its place in an error."""
    if hasattr(value, "tolist"):  # a number or an array of NumPy's, or of a library like it
        value = value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each, f"{where}, {key!r}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        each = [_plain(each, where) for each in value]
        return each if isinstance(value, list) else tuple(each)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number or None, got {value}")
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{where}: a result holds {type(value).__name__}, which JSON has no form for")


def _not_finite(value: Any) -> list[float]:
    """Return the numbers in a value that are NaN or infinite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for each in value for number in _not_finite(each)]
    return [value] if isinstance(value, float) and not math.isfinite(value) else []


def _commit() -> str:
    """Return the commit of this tree; CUPAGED_COMMIT names it for a copy that carries no .git folder."""
    named = os.environ.get("CUPAGED_COMMIT")
    if named:
        return named
    try:
        if not ((SOURCE_TREE / "pyproject.toml").is_file() and (SOURCE_TREE / ".git").exists()):
            raise OSError("not a checkout")  # a git repository around an installed package is somebody else's
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=SOURCE_TREE, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return f"cupaged {metadata.version('cupaged')}" if _installed() else "unknown"
    return answer.stdout.strip()


def _installed() -> bool:
    try:
        metadata.version("cupaged")
    except metadata.PackageNotFoundError:
        return False
    return True


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def _gpu_stamp() -> dict[str, str]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    driver, runtime = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    return {
        "device": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "driver": _driver_release() or f"CUDA {driver // 1000}.{driver % 1000 // 10}",
        "cuda": f"{runtime // 1000}.{runtime % 1000 // 10}",
        "cupy": cupy.__version__,
    }


def _driver_release() -> str | None:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n", 1)[0].strip() or None

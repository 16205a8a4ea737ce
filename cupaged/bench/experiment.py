"""What every experiment shares: arguments, stamp, progress, failed rows, resuming, worker processes, tables and files.

A script in experiments/ says what is its own in a subclass of `Experiment`: the question, what to expect and why, the
cells, how a cell is measured, the columns, the conclusion and the picture. `run` does the rest.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from tqdm import tqdm

from cupaged.bench.ceilings import read_ceiling
from cupaged.bench.partial import Partial, Row
from cupaged.bench.report import (
    FAILURES,
    argument_parser,
    console,
    machine_stamp,
    measured_row,
    positive,
    print_table,
    result_folder,
    run_experiment,
    write_results,
)
from cupaged.bench.spread import each_measured
from cupaged.runtime import choose_backend

__all__ = [
    "Experiment",
    "Row",
    "begin",
    "print_failures",
    "run",
    "run_script",
]

STOPPED = 130  # what a shell calls the status of a command that Ctrl-C ended


class Experiment:
    """A question, how it is measured, and what its rows say.

    A subclass sets the attributes that differ, and defines `cells` and `measure`. What a script needs for nothing else
    stands in the script by its usual name, and is found there: its docstring, which asks the question, the functions
    `conclusion` and `draw`, and COLUMNS, or GPU_COLUMNS and HOST_COLUMNS. While it runs, `options`, `backend`, `smoke`,
    `config`, `stamp` and `once` hold what this run was asked for and what it found before its first cell.
    """

    name: str = ""
    """Name of its results; unless given, the script's."""
    question: str = ""
    """What ``--help`` opens with, a question in its first line; unless given, the script's docstring."""
    expectation: str = ""
    """What to expect, and why; it is printed before the work."""
    claim: str = ""
    """What others state about the question; it is printed below the conclusion."""

    place: int = 0
    """Where it stands in the report of all experiments."""
    runs_on: str = "both"
    """ "gpu": it needs a GPU; "both": on a GPU, or on the host build of the kernels; "cpu": it runs no kernel."""
    wants_quiet_cpu: bool = False
    """Whether it times the CPU's work for the GPU, so that nothing may run beside it."""
    longest_s: int = 1200
    """Seconds after which whoever runs all experiments gives it up."""
    spreads: bool = False
    """Whether cells may run in several processes on a CPU: true only where no time of the CPU is measured."""

    configs: ClassVar[Mapping[tuple[str, bool], Any]] = {}
    """The configuration by backend and ``--smoke``."""
    reads_ceiling: bool = False
    """Whether rows are held to the GPU's read ceiling, which is then measured before the first cell."""
    failures: tuple[type[Exception], ...] = FAILURES
    """Errors of `measure` that make a failed row; others end the run."""
    launches_for_ncu: bool = False
    """Whether ``--launch-only`` makes the launches that Nsight Compute counts; see `launch`."""
    keeps_what_was_measured: bool = False
    """Whether an interrupted run reports its finished cells, as ``<name>_stopped``."""
    unit: str = "cell"
    """What the progress bar counts."""

    options: argparse.Namespace
    backend: str
    smoke: bool
    config: Any
    stamp: dict[str, str]
    once: dict[str, Any]
    script: ClassVar[dict[str, Any]]
    """The names that its script defines."""

    def __init_subclass__(cls) -> None:
        cls.script = vars(sys.modules[cls.__module__])
        cls.name = cls.name or Path(cls.script.get("__file__") or "").stem
        cls.question = cls.question or cls.script.get("__doc__") or ""

    # --- before the work ---

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add arguments of its own to the command line."""

    def choose_backend(self) -> str:
        """Return where this run works: "cuda", "host" or "cpu"."""
        if self.runs_on == "cpu":
            return "cpu"
        return choose_backend("cuda" if self.runs_on == "gpu" else self.options.backend)

    def set_up(self) -> None:
        """Make what the cells need of `options` and `config`; a ValueError is a mistake in the arguments."""

    def make_stamp(self) -> dict[str, str]:
        """Return what a reader must know about the machine."""
        return machine_stamp(self.backend)

    def expect(self) -> str:
        """Return what to expect, and why."""
        return self.expectation

    def measure_once(self) -> dict[str, Any]:
        """Return what is measured before the first cell, as JSON knows it; a resumed run takes it over."""
        return {"read_ceiling_gb_s": read_ceiling()} if self.reads_ceiling and self.backend == "cuda" else {}

    def prepare(self) -> None:
        """Do what must come before the first cell and leaves no number: build kernels, load a model."""

    def go_on(self, rows: list[Row]) -> None:
        """Take what later cells need from the rows of the run that is resumed."""

    def launch(self) -> None:
        """Make the launches that Nsight Compute counts, and nothing else."""

    @property
    def asked(self) -> str:
        """The question: the first line of `question`."""
        return self.question.split("\n", 1)[0]

    @property
    def ceiling(self) -> float | None:
        """The GPU's read ceiling in GB/s; None where none is measured."""
        return self.once.get("read_ceiling_gb_s")

    # --- the work ---

    def cells(self) -> Sequence[Any]:
        """Return what is measured, in the order of the rows; the same list for the same options."""
        raise NotImplementedError

    def what(self, cell: Any) -> Row:
        """Return the part of a row that says what was measured."""
        return asdict(cell) if is_dataclass(cell) and not isinstance(cell, type) else dict(cell)

    def measure(self, cell: Any) -> Row:
        """Return what was found, ``status`` included."""
        raise NotImplementedError

    def rows(self, cell: Any) -> list[Row]:
        """Return the rows of a cell: one, unless several share what takes long to build.

        They come to `compare`, `conclusion` and `draw` as JSON knows them. No table and no file shows a key that begins
        with "_".
        """
        return [measured_row(self.what(cell), lambda: self.measure(cell), self.failures)]

    def compare(self, rows: list[Row]) -> list[Row]:
        """Return the rows with what only all of them together tell: gains, ratios, overheads."""
        return rows

    # --- what it says ---

    def columns(self) -> Mapping[str, str]:
        """Return the columns of the table, as `print_table` takes them: those that the script lists."""
        by_backend = "GPU_COLUMNS" if self.backend == "cuda" else "HOST_COLUMNS"
        return self.script["COLUMNS" if "COLUMNS" in self.script else by_backend]

    def title(self) -> str:
        """Return what the table shows."""
        return self.asked

    def show(self, rows: list[Row]) -> None:
        """Print the table, and what went wrong if the table has no room for it."""
        columns = self.columns()
        print_table(rows, columns, self.title())
        if "status" not in columns:
            print_failures(rows)

    def conclusion(self, rows: list[Row]) -> str:
        """Return what the rows say, in a few sentences: those of the script's `conclusion`."""
        return self.script["conclusion"](rows)

    def notes(self, rows: list[Row]) -> dict[str, Any]:
        """Return what the JSON file holds beside the stamp, the conclusion and the rows."""
        return {"config": asdict(self.config)}

    def file_name(self) -> str:
        """Return the name of its results, without a suffix."""
        return self.name

    def write(self, rows: list[Row], name: str, verdict: str) -> Path:
        """Write the results and return their folder."""
        notes = {**self.notes(rows), "conclusion": verdict}
        return write_results(rows, self.stamp, name, self.options.out, **notes)

    def draw(self, rows: list[Row], path: Path) -> None:
        """Draw the picture, if the rows have something to draw: that of the script's `draw`."""
        if "draw" in self.script:
            self.script["draw"](rows, self.stamp, path)

    def went_well(self, rows: list[Row]) -> bool:
        """Whether the run succeeded: every row is right."""
        return all(row.get("status", "ok") == "ok" for row in rows)

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run it with these arguments; returns 0 if it succeeded."""
        return run(self, arguments)


# --- running ------------------------------------------------------------------------------------------------------


def run(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """Run an experiment as its command line says, and write what it found.

    Returns
    -------
    int
        0 if everything was measured and went well.

    Raises
    ------
    KeyboardInterrupt
        The run was stopped, by Ctrl-C or SIGTERM; ``--resume`` continues it.
    """
    parser = begin(experiment, arguments)
    options = experiment.options
    if experiment.launches_for_ncu and options.launch_only:
        experiment.launch()
        return 0
    experiment.stamp = experiment.make_stamp()
    folder = result_folder(experiment.stamp, options.out)  # before the work: a folder that cannot be written ends it
    console.print(experiment.expect(), "\n")

    cells, name = list(experiment.cells()), experiment.file_name()
    partial = Partial(folder / f"{name}.partial.jsonl", _identity(experiment, cells))
    found = _found_before(partial, parser) if options.resume else {}
    _find_once(experiment, partial, found)
    whole = _measure_all(experiment, cells, partial, found)
    if not whole:
        name += "_stopped"
    rows = experiment.compare([row for number in sorted(found) for row in found[number]])
    _report(experiment, rows, name)
    if whole:
        partial.remove()
    return 0 if whole and experiment.went_well(rows) else 1


def begin(experiment: Experiment, arguments: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Give an experiment what its command line says, and return the command line's parser; nothing is measured."""
    parser = _parser(experiment)
    experiment.options = options = parser.parse_args(arguments)
    experiment.smoke, experiment.once = options.smoke, {}
    experiment.backend = experiment.choose_backend()
    experiment.config = experiment.configs.get((experiment.backend, experiment.smoke))
    if experiment.backend == "cuda" and options.workers > 1:
        parser.error("argument --workers: cells are spread over a CPU; on a GPU they run one at a time")
    try:
        experiment.set_up()
    except ValueError as error:
        parser.error(str(error))
    return parser


def run_script(experiment: Experiment) -> NoReturn:
    """Run an experiment as the script that defines it, and exit."""

    def main() -> int:
        try:
            return experiment.main()
        except KeyboardInterrupt:
            return STOPPED

    run_experiment(main)


def print_failures(rows: Iterable[Row], most: int = 3) -> None:
    """Print the first reasons why rows are not right."""
    reasons = dict.fromkeys(row["status"] for row in rows if row.get("status", "ok") != "ok")
    for reason in list(reasons)[:most]:
        console.print(f"not ok: {reason}", style="bold red")


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    parser = argument_parser(experiment.question, backends=experiment.runs_on == "both")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was stopped in this folder")
    parser.set_defaults(workers=1)
    if experiment.spreads:
        parser.add_argument(
            "--workers", type=positive(int), default=1, help="processes that share the work on a CPU (default: 1)"
        )
    if experiment.launches_for_ncu:
        parser.add_argument("--launch-only", action="store_true", help="launch what ncu counts, on the GPU")
    experiment.add_options(parser)
    return parser


def _identity(experiment: Experiment, cells: list[Any]) -> dict[str, Any]:
    """Return what two runs must have in common for one to go on with the other."""
    neutral = ("out", "resume", "workers", "launch_only")
    return {
        "experiment": experiment.name,
        "arguments": {key: str(value) for key, value in vars(experiment.options).items() if key not in neutral},
        "machine": {key: value for key, value in experiment.stamp.items() if key != "date"},
        "cells": len(cells),
    }


def _found_before(partial: Partial, parser: argparse.ArgumentParser) -> dict[int, list[Row]]:
    """Return the rows, by the number of their cell, of the run that is resumed."""
    try:
        return partial.read()
    except ValueError as error:
        parser.error(f"argument --resume: {error}")


def _find_once(experiment: Experiment, partial: Partial, found: dict[int, list[Row]]) -> None:
    """Measure what comes before the first cell, or take it over with the rows that were found."""
    if found:
        experiment.once = partial.once
        experiment.go_on([row for number in sorted(found) for row in found[number]])
        return
    if partial.path.exists() and not experiment.options.resume:
        console.print(f"starting over; --resume would have gone on with {partial.path}\n")
    experiment.once = experiment.measure_once()
    partial.begin(experiment.once)


def _measure_all(experiment: Experiment, cells: list[Any], partial: Partial, found: dict[int, list[Row]]) -> bool:
    """Add the rows of all cells that are still to be measured to `found`; returns whether none is missing."""
    left = [(number, cell) for number, cell in enumerate(cells) if number not in found]
    bar = tqdm(total=len(cells), initial=len(found), desc=experiment.name, unit=experiment.unit)
    try:
        with bar, _terminated_as_interrupted():
            experiment.prepare()
            for number, rows in each_measured(experiment, left):
                found[number] = partial.add(number, rows)
                bar.update()
    except KeyboardInterrupt:
        done = f"stopped after {len(found)} of {len(cells)} cells"
        console.print(f"{done}; the same command with --resume goes on\n" if found else done)
        if not (experiment.keeps_what_was_measured and found):
            raise
    return len(found) == len(cells)


def _report(experiment: Experiment, rows: list[Row], name: str) -> None:
    """Print and write what was found."""
    experiment.show(rows)
    verdict = experiment.conclusion(rows)
    console.print(verdict, *[experiment.claim] * bool(experiment.claim), "\n")
    folder = experiment.write([_without_private(row) for row in rows], name, verdict)
    picture = folder / f"{name}.png"
    experiment.draw(rows, picture)
    console.print(f"table, JSON and {'picture' if picture.exists() else 'no picture'}: {folder}")


def _without_private(row: Row) -> Row:
    """Return a row without the keys that begin with "_": what a conclusion or a picture needs and no table shows."""
    return {key: value for key, value in row.items() if not key.startswith("_")}


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, where this is the main thread."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt("SIGTERM")

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Do the tests notice small mistakes? Make one at a time in a copy of the project, and run the tests that must fail.

    python -m tests.mutation.run                               all mutants, a table on the terminal
    python -m tests.mutation.run --only 'sample*'              those whose name fits a pattern
    python -m tests.mutation.run --jobs 2 --out tests/mutation/RESULTS.md

The mutants are in `tests/mutation/mutants.py`. The tests of all mutants must pass before the first mistake is made. A
mutant whose old text is not found exactly once is STALE: the code has changed, and the mutant must follow.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutation.mutants import MUTANTS, Mutant

PROJECT = Path(__file__).resolve().parents[2]
COPIED = ("cupaged", "kernels_cu", "tests", "experiments", "notebooks", "pyproject.toml", "README.md")
TIMEOUT_SECONDS = 300  # for the tests of a mutant: it may well hang
TIMEOUT_OF_ALL = 3600
KILLED, EXPLAINED = "killed", "explained"  # the outcomes that are as they should be
LIVES, STALE, NOT_EQUIVALENT, BROKEN = "LIVES", "STALE", "NOT EQUIVALENT", "BROKEN"
TESTS_FAILED = 1  # pytest's exit status
NO_FAIR_TEST = ("KernelBuildError", "SyntaxError", "IndentationError")  # the mutant does not even build


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    verdict: str
    detail: str  # the test that killed it, or why it is not dead
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether it is dead or explained."""
        return self.verdict in (KILLED, EXPLAINED)


class Copy:
    """A copy of the project, in which one mistake at a time is made."""

    def __init__(self, folder: Path, kernel_cache: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "CUPAGED_CACHE_DIR": str(kernel_cache)}
        self.environment.pop("CUPAGED_KERNELS", None)  # would name kernels outside the copy
        folder.mkdir()
        for name in COPIED:
            if (PROJECT / name).is_dir():
                shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(PROJECT / name, folder / name)

    def pytest(self, tests: Iterable[str], timeout: float = TIMEOUT_SECONDS) -> tuple[int | None, str]:
        """Run tests up to the first that fails; return pytest's exit status (None: no end in time) and its output."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", *tests]
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the session that it leads: kernels are compiled by further processes
            process.communicate()
            return None, ""
        return process.returncode, output

    def try_out(self, mutant: Mutant) -> Outcome:
        """Make the mistake, run the tests that must notice it, and undo it."""
        path = self.folder / mutant.file
        text = path.read_text(encoding="utf-8")
        count = text.count(mutant.old)
        if count != 1:
            return Outcome(mutant, STALE, f"its old text is found {count} times")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        began = time.monotonic()
        try:
            status, output = self.pytest(mutant.tests)
        finally:
            path.write_text(text, encoding="utf-8")
        return judged(mutant, status, output, time.monotonic() - began)


def judged(mutant: Mutant, status: int | None, output: str, seconds: float) -> Outcome:
    """Say what an exit status and an output of pytest mean for a mutant."""
    if status == 0 and mutant.equivalent:
        return Outcome(mutant, EXPLAINED, mutant.equivalent, seconds)
    if status == 0:
        return Outcome(mutant, LIVES, "all tests pass", seconds)
    killer = _killer(status, output)
    builds = not any(re.search(rf"^E .*\b{error}\b", output, re.MULTILINE) for error in NO_FAIR_TEST)
    if killer is None or not builds:
        last = output.strip().splitlines()[-1:] or ["no output"]
        return Outcome(mutant, BROKEN, "it does not build" if killer else f"status {status}: {last[0]}", seconds)
    if mutant.equivalent:
        return Outcome(mutant, NOT_EQUIVALENT, killer, seconds)
    return Outcome(mutant, KILLED, killer, seconds)


def _killer(status: int | None, output: str) -> str | None:
    """Return the test that failed; a run that hangs or crashes has no name for it. None: pytest itself went wrong."""
    if status is None:
        return f"no end within {TIMEOUT_SECONDS} s"
    if status < 0:
        return f"a crash, signal {-status}"
    failed = re.search(r"^FAILED (\S+?::\w+(?:\[.*?\])?)(?: - |$)", output, re.MULTILINE)
    return failed[1] if status == TESTS_FAILED and failed else None


def chosen(pattern: str) -> list[Mutant]:
    """Return the mutants whose name fits a pattern of the shell's kind."""
    return [mutant for mutant in MUTANTS if fnmatch.fnmatchcase(mutant.name, pattern)]


def try_all(mutants: Sequence[Mutant], jobs: int) -> list[Outcome]:
    """Return what becomes of each mutant, in their order; several copies of the project work side by side."""
    with tempfile.TemporaryDirectory(prefix="cupaged-mutants-") as name:
        folder = Path(name)
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(jobs):
            copies.put(Copy(folder / f"copy{number}", folder / "kernels"))
        _check_unmutated(copies, mutants)

        def try_one(mutant: Mutant) -> Outcome:
            copy = copies.get()
            try:
                outcome = copy.try_out(mutant)
            finally:
                copies.put(copy)
            print(f"{outcome.seconds:6.1f} s  {outcome.verdict:9}  {mutant.name}: {outcome.detail}", flush=True)
            return outcome

        pool = ThreadPoolExecutor(jobs)
        try:
            return list(pool.map(try_one, mutants))
        finally:
            pool.shutdown(cancel_futures=True)  # whoever interrupts does not wait for all


def _check_unmutated(copies: SimpleQueue[Copy], mutants: Sequence[Mutant]) -> None:
    """Exit unless all tests pass on the project as it is: else their failing says nothing."""
    copy = copies.get()
    status, output = copy.pytest(dict.fromkeys(test for mutant in mutants for test in mutant.tests), TIMEOUT_OF_ALL)
    copies.put(copy)
    if status != 0:
        raise SystemExit(f"{output}\nThe tests must pass before a mistake is made.")


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the table that is committed."""
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    explained = sum(outcome.verdict == EXPLAINED for outcome in outcomes)
    lines = [
        "# Small mistakes, and the tests that notice them",
        "",
        'Made by `python -m tests.mutation.run --out tests/mutation/RESULTS.md`, with the backend "host".',
        "",
        f"{len(outcomes)} mutants: {len(outcomes) - len(wrong) - explained} killed, {explained} explained, "
        f"{len(wrong)} neither.",
        "",
        "| mutant | file | what must hold | outcome | by which test, or why | s |",
        "|---|---|---|---|---|---:|",
    ]
    for outcome in outcomes:
        mutant = outcome.mutant
        detail = f"`{outcome.detail}`" if "::" in outcome.detail else outcome.detail
        cells = mutant.name, f"`{mutant.file}`", mutant.holds, outcome.verdict, detail, f"{outcome.seconds:.1f}"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns 0 if every mutant is dead or explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="mutants whose name fits, with * and ?")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are tried side by side")
    parser.add_argument("--out", type=Path, help="where to write the table, of all mutants")
    options = parser.parse_args(arguments)
    mutants = chosen(options.only)
    if not mutants:
        parser.error(f"--only: no mutant's name fits {options.only!r}")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {options.jobs}")
    if options.out and len(mutants) < len(MUTANTS):
        parser.error("--out takes the table of all mutants: leave out --only")
    outcomes = try_all(mutants, options.jobs)
    if options.out:
        options.out.write_text(as_markdown(outcomes), encoding="utf-8")
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    print(f"{len(outcomes)} mutants, {len(wrong)} neither killed nor explained")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

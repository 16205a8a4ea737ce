"""Where the scripts of experiments are, and how they are loaded and run by name."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cupaged.bench.experiment import Experiment
from cupaged.bench.report import SOURCE_TREE

__all__ = ["all_experiments", "experiment_scripts", "load_experiment", "run_named"]

SCRIPTS = SOURCE_TREE / "experiments"


def experiment_scripts(folder: Path = SCRIPTS) -> dict[str, Path]:
    """Return the scripts of a checkout's experiments/ folder by name; none where the package is installed alone."""
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def load_experiment(path: Path) -> Experiment:
    """Return the experiment that a script defines as EXPERIMENT."""
    with _importable(path.parent):
        return runpy.run_path(str(path))["EXPERIMENT"]


def all_experiments(folder: Path = SCRIPTS) -> list[Experiment]:
    """Return the experiments of a checkout, in the order of the report."""
    found = [load_experiment(path) for path in experiment_scripts(folder).values() if _defines_one(path)]
    return sorted(found, key=lambda each: each.place)


def _defines_one(script: Path) -> bool:
    """Whether a script defines an experiment: others read results, or run experiments."""
    return "\nEXPERIMENT = " in script.read_text(encoding="utf-8")


def run_named(name: str, arguments: Sequence[str]) -> int:
    """Run the script of an experiment as ``python experiments/<name>.py`` does; returns 2 where no script has it."""
    scripts = experiment_scripts()
    if name not in scripts:
        known = ", ".join(scripts) or f"none: there is no {SCRIPTS} (a wheel holds the package alone)"
        asked = f"no experiment is called {name!r}" if name else "expected the name of an experiment"
        print(f"{asked}; experiments: {known}", file=sys.stderr)
        return 2
    sys.argv = [str(scripts[name]), *arguments]
    with _importable(SCRIPTS):
        runpy.run_path(str(scripts[name]), run_name="__main__")
    return 0


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a script import its neighbours, as Python does where it is run by its path."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))

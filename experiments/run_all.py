"""What do all experiments find on this machine?

Runs every experiment, settles the claims by what they found, and writes one self-contained page, report.html: tables
and pictures inline, readable on a phone. What this machine cannot run is named on it, with the reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cupaged.bench import html
from cupaged.bench.experiment import Experiment
from cupaged.bench.report import (
    COULD_NOT_RUN,
    argument_parser,
    console,
    machine_stamp,
    print_table,
    result_folder,
    run_experiment,
)
from cupaged.bench.scripts import all_experiments
from cupaged.runtime import choose_backend

HERE = Path(__file__).resolve().parent
EXPERIMENTS = {each.name: each for each in all_experiments(HERE)}  # in the order of the report
TIMES_THE_CPU = {name for name, each in EXPERIMENTS.items() if each.wants_quiet_cpu}
ROWS_SHOWN = 500
CORES_TO_SPARE = 8


@dataclass
class Outcome:
    """How an experiment ended, and the files that it left."""

    name: str
    status: str
    seconds: float = 0.0
    documents: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Run everything and write the report; returns 0 if nothing that could run failed."""
    options = options_parser().parse_args(arguments)
    backend = choose_backend(options.backend)
    stamp = machine_stamp(backend)
    out = result_folder(stamp, options.out)
    outcomes = run_each(options.only or list(EXPERIMENTS), backend, out, options.smoke)
    claims = run("claims", backend, out, options.smoke)
    rows = [{"experiment": o.name, "seconds": o.seconds, "status": o.status} for o in (*outcomes, claims)]
    print_table(rows, {"experiment": "experiment", "seconds": "s|.1f", "status": "status"}, "What was run")
    if claims.documents:
        console.print(claims.documents[0]["conclusion"], "\n")
    report = out / "report.html"
    report.write_text(as_page(outcomes, claims, stamp, options.smoke), encoding="utf-8")
    console.print(f"report: {report}")
    return 1 if any(row["status"].startswith("failed") for row in rows) else 0


def options_parser() -> ArgumentParser:
    """Return the command line."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), help="run these experiments (default: all)")
    return parser


# --- running ------------------------------------------------------------------------------------------------------


def run_each(names: list[str], backend: str, out: Path, smoke: bool) -> list[Outcome]:
    """Run experiments one after the other; beside a GPU and with cores to spare, those that run no kernel meanwhile.

    What times the CPU beside the GPU then runs last, with nothing beside it.
    """
    lanes, last = [names], []
    if backend == "cuda" and (os.cpu_count() or 1) >= CORES_TO_SPARE:
        last = [name for name in names if name in TIMES_THE_CPU]
        others = [name for name in names if name not in TIMES_THE_CPU]
        lanes = [[name for name in others if (EXPERIMENTS[name].runs_on == "cpu") == alone] for alone in (False, True)]
    outcomes: dict[str, Outcome] = {}
    with tqdm(total=len(names), unit="experiment") as progress, ThreadPoolExecutor(len(lanes)) as pool:

        def run_lane(lane: list[str]) -> None:
            for name in lane:
                progress.set_description(name)
                outcomes[name] = run(name, backend, out, smoke)
                progress.write(f"{name}: {outcomes[name].status}, {outcomes[name].seconds:.0f} s")
                progress.update()

        list(pool.map(run_lane, lanes))
        run_lane(last)
    return [outcomes[name] for name in names]


def run(name: str, backend: str, out: Path, smoke: bool) -> Outcome:
    """Run one experiment in a process of its own."""
    experiment = EXPERIMENTS.get(name)  # the claims are none: they read results
    kind, longest_s = (experiment.runs_on, experiment.longest_s) if experiment else ("cpu", Experiment.longest_s)
    if kind == "gpu" and backend != "cuda":
        return Outcome(name, "not run: needs a GPU")
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out), *["--smoke"] * smoke]
    command += ["--backend", backend] if kind == "both" else []
    command += (
        ["--results", str(out)] if name == "claims" else []
    )  # only what is in this folder: each card says where it is from
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    started, clock = time.time(), time.perf_counter()
    status, output, errors = _answer(command, {**os.environ, "PYTHONPATH": path}, longest_s)
    outcome = Outcome(name, "ok", time.perf_counter() - clock)
    if status != 0:
        said = " ".join((errors or output).split())[-300:]
        why = f"failed: stopped after {longest_s} s" if status is None else f"failed with status {status}"
        outcome.status = f"not run: {said}" if status == COULD_NOT_RUN else f"{why}: {said}"
    for file in sorted([*out.glob(f"{name}.*"), *out.glob(f"{name}_*")], key=lambda file: (len(file.stem), file.stem)):
        if file.stat().st_mtime < started - 1:  # of an earlier run
            continue
        if file.suffix == ".json":
            try:
                outcome.documents.append(json.loads(file.read_text(encoding="utf-8")))
            except ValueError as error:
                outcome.status = f"failed: {file.name} is not JSON: {error}"
        elif file.suffix == ".png":
            outcome.pictures.append(file)
    return outcome


def _answer(command: list[str], variables: dict[str, str], longest_s: float) -> tuple[int | None, str, str]:
    """Return a command's status, None if it had to be stopped, and what it said; nothing that it started goes on."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=variables, start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=longest_s)
    except BaseException as error:  # Ctrl-C among them, which does not reach another session
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return None, output, errors
    return process.returncode, output, errors


# --- the report ---------------------------------------------------------------------------------------------------


def as_page(outcomes: list[Outcome], claims: Outcome, stamp: dict[str, str], smoke: bool) -> str:
    """Return the report."""
    said = ", ".join(f"{key} {value}" for key, value in stamp.items())
    body = [html.paragraph(f"Measured on: {said}.", faint=True)]
    if smoke:
        body.append(
            html.paragraph("A smoke run: sizes are too small to settle anything; it shows that everything runs.")
        )
    if stamp["backend"] != "cuda":
        body.append(
            html.paragraph("Without a GPU: results are checked and traffic is counted; there are no GPU timings.")
        )
    body.append(html.contents((each.name, ending(each)) for each in (*outcomes, claims)))
    body.append(html.section("claims", "The claims, settled", claim_parts(claims)))
    body += [html.section(outcome.name, EXPERIMENTS[outcome.name].asked, parts(outcome)) for outcome in outcomes]
    return html.page(f"cupaged on {stamp['device']}", body)


def ending(outcome: Outcome) -> str:
    """Return how an experiment ended, in few words."""
    return f"{outcome.status.split(':')[0]}, {outcome.seconds:.0f} s"


def claim_parts(claims: Outcome) -> list[str]:
    """Return the ledger."""
    if not claims.documents:
        return [html.paragraph(claims.status)]
    (document,) = claims.documents
    pictures = [html.picture(path, "claims: stated, published, measured") for path in claims.pictures]
    return [html.paragraph(document["conclusion"]), *pictures, html.verdict_cards(document["rows"])]


def parts(outcome: Outcome) -> list[str]:
    """Return what an experiment found."""
    found = [html.paragraph(f"python experiments/{outcome.name}.py: {outcome.status}", faint=True)]
    conclusions = [document["conclusion"] for document in outcome.documents if document.get("conclusion")]
    found += [html.paragraph(text) for text in conclusions]
    found += [html.picture(path, f"{outcome.name}: {path.stem.replace('_', ' ')}") for path in outcome.pictures]
    for document in outcome.documents:
        rows = document["rows"]
        title = document["experiment"] + (
            f", the first {ROWS_SHOWN} of {len(rows):,}" if len(rows) > ROWS_SHOWN else ""
        )
        found.append(html.table(rows[:ROWS_SHOWN], title))
    return found


if __name__ == "__main__":
    run_experiment(main)

"""Which of the numbers that the documents state as facts hold?

Every claim beside the published figure, what was measured, and a verdict: holds, holds partly, does not hold, or could
not be measured here, with the reason. Results are read from --out, then from experiments/results; --run makes those
that are missing. Each row names the one command that measures it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cupaged.bench.claims import CLAIMS, FAILS, HOLDS, OPEN, PARTLY, VERDICTS, Claim, judge
from cupaged.bench.report import (
    argument_parser,
    console,
    device_folder,
    machine_stamp,
    new_figure,
    print_table,
    result_folder,
    run_experiment,
    save_figure,
    write_results,
)
from cupaged.runtime.select import why_no_gpu

Row = dict[str, Any]

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
COLOURS = {HOLDS: "#2a7f3f", PARTLY: "#b07a00", FAILS: "#b3261e", OPEN: "#777777"}
COLUMNS = {"statement": "claim", "published": "published", "measured": "measured", "verdict": "verdict"}
SMOKE_NOTE = "Smoke run: sizes too small to settle anything; what was run new says only that everything runs."


def main(arguments: list[str] | None = None) -> int:
    """Write the ledger; returns 0 if every experiment that was run succeeded."""
    options = options_parser().parse_args(arguments)
    stamp = machine_stamp("cpu" if why_no_gpu() else "cuda")
    out = result_folder(stamp, options.out)
    folders = search_folders(out, options.results, device_folder(stamp))
    failures = run_missing(folders, out, options.smoke) if options.run else []
    rows = settle(folders)
    print_table(rows, COLUMNS, "The claims")
    verdict = conclusion(rows)
    console.print(verdict, "\n")
    for failure in failures:
        console.print(failure)
    write_results(rows, stamp, "claims", out, smoke=options.smoke, conclusion=verdict)
    notes = [verdict, *([SMOKE_NOTE] if options.smoke else []), *failures]
    (out / "claims.md").write_text(as_markdown(rows, notes), encoding="utf-8")
    draw(rows, out / "claims.png")
    console.print(f"claims.md, table, JSON and picture: {out}")
    return 1 if failures else 0


def options_parser() -> ArgumentParser:
    """Return the command line."""
    parser = argument_parser(__doc__ or "", backends=False)
    parser.add_argument("--run", action="store_true", help="run the experiments whose results are missing, into --out")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of <device>/<experiment>.json to read after --out"
    )
    return parser


# --- finding results ----------------------------------------------------------------------------------------------


def search_folders(out: Path, results: Path, device: str) -> list[Path]:
    """Return where results are looked for: what was made now, this device's, the CPU's, then other devices'."""
    others = sorted(folder for folder in results.iterdir() if folder.is_dir()) if results.is_dir() else []
    return list(dict.fromkeys([out, results / device, results / "cpu", *others]))


def find(claim: Claim, folders: list[Path]) -> tuple[dict[str, Any], Path] | None:
    """Return the first result of a claim's experiment that was made where it must be, and its file.

    Raises
    ------
    OSError
        A file is there and holds something else.
    """
    for folder in folders if claim.experiment else ():
        path = folder / f"{claim.experiment}.json"
        if path.is_file():
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
                backend = document["stamp"]["backend"]
            except (ValueError, KeyError, TypeError) as error:
                raise OSError(f"{path} is no result of an experiment: {error!r}") from None
            if not claim.gpu or backend == "cuda":
                return document, path
    return None


def run_missing(folders: list[Path], out: Path, smoke: bool) -> list[str]:
    """Run the experiments that some claim lacks a result of, where this machine can; return what failed."""
    missing = {claim.experiment: claim.gpu for claim in CLAIMS if claim.experiment and find(claim, folders) is None}
    runnable = [name for name, needs_gpu in missing.items() if not (needs_gpu and why_no_gpu())]
    failures = []
    for name in tqdm(runnable, desc="experiments", unit="experiment"):
        command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out), *["--smoke"] * smoke]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode != 0:
            said = " ".join((answer.stderr or answer.stdout).split())[-300:]
            failures.append(f"{name}.py failed with status {answer.returncode}: {said}")
    return failures


def settle(folders: list[Path]) -> list[Row]:
    """Return the ledger's rows."""
    rows = []
    for claim in CLAIMS:
        found = find(claim, folders)
        finding = judge(claim, found[0] if found else None)
        stamp = found[0]["stamp"] if found else {}
        rows.append(
            {
                "name": claim.name,
                "statement": claim.statement,
                "origin": claim.origin,
                "published": claim.published,
                "source": claim.source,
                "measured": finding.measured or None,
                "verdict": finding.verdict,
                "reason": finding.reason,
                "needs_gpu": claim.gpu,
                "device": stamp.get("device"),
                "commit": stamp.get("commit"),
                "date": stamp.get("date"),
                "command": claim.command,
                "unit": claim.unit,
                "stated_values": claim.stated_values,
                "published_values": claim.published_values,
                "measured_values": finding.values,
            }
        )
    return rows


# --- reporting ----------------------------------------------------------------------------------------------------


def conclusion(rows: list[Row]) -> str:
    """Count the verdicts."""
    counts = ", ".join(f"{verdict} {sum(row['verdict'] == verdict for row in rows)}" for verdict in VERDICTS)
    waiting = [row["name"] for row in rows if row["verdict"] == OPEN and row["needs_gpu"]]
    return f"Of {len(rows)} claims: {counts}." + (f" For want of a GPU: {', '.join(waiting)}." if waiting else "")


def as_markdown(rows: list[Row], notes: list[str]) -> str:
    """Return the ledger as a page."""
    lines = ["# Claims", "", *[line for note in notes for line in (as_cell(note), "")]]
    heads = ("claim", "stated in", "published", "measured", "verdict", "why", "on", "measured by")
    lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        device = f"{row['device']}, {row['commit']}, {row['date']}" if row["device"] else "–"
        cells = (
            row["statement"], row["origin"], f"{row['published']} ({row['source']})", row["measured"] or "–",
            f"**{row['verdict']}**", row["reason"] or "–", device, f"`{row['command']}`",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(as_cell, cells))} |")
    page = "\n".join([*lines, ""])
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def as_cell(text: str) -> str:
    """Return a text as a table's cell: in one line, nothing of it markup of HTML or the end of the cell."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(text.split()))
    return re.sub(r"<(?=[\w/!?])", "&lt;", text).replace("|", r"\|")


def draw(rows: list[Row], path: Path) -> None:
    """A line for each claim: stated, published and measured as multiples of what is stated, and the verdict."""
    figure, axis = new_figure(width=13, height=0.48 * len(rows) + 1.6)
    for y, row in enumerate(reversed(rows)):
        base = geometric_middle(row["stated_values"] or row["published_values"])
        parts = (("stated", "#222222", 9.0), ("published", "#6b9ac4", 6.0), ("measured", COLOURS[row["verdict"]], 3.5))
        for (name, colour, width), shift in zip(parts, (0.22, 0.0, -0.22), strict=True):
            values = row[f"{name}_values"]
            if base and values:
                low, high = (max(value, base / 100) / base for value in values)
                axis.plot(
                    [low / 1.03, high * 1.03], [y + shift] * 2, color=colour, linewidth=width, solid_capstyle="butt"
                )
        if base is None and row["measured"]:  # nothing to be a multiple of: the words instead
            said, plain = shortened(row["measured"], 110), {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axis.text(0.01, y, said, transform=axis.get_yaxis_transform(), va="center", fontsize=8, bbox=plain)
        if base and row["measured_values"] and min(row["measured_values"]) < base / 100:
            axis.plot(0.01, y - 0.22, "<", color=COLOURS[row["verdict"]], markersize=5)  # goes on to the left
        verdict = row["verdict"] if row["verdict"] != OPEN else "not measured here"
        axis.text(1.01, y, verdict, transform=axis.get_yaxis_transform(), va="center", color=COLOURS[row["verdict"]])
    labels = [shortened(row["statement"]) for row in reversed(rows)]
    axis.set_yticks(range(len(rows)), labels, fontsize=9)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xscale("log")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("multiples of what is stated; where nothing is stated, of what was published; arrows: below 0.01")
    for name, colour in (
        ("stated", "#222222"),
        ("published", "#6b9ac4"),
        ("measured, in the verdict's colour", "#999999"),
    ):
        axis.plot([], [], color=colour, linewidth=4, label=name)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.07), ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def geometric_middle(values: tuple[float, float] | None) -> float | None:
    """Return the middle of a range on a logarithmic axis."""
    return (values[0] * values[1]) ** 0.5 if values else None


def shortened(text: str, limit: int = 72) -> str:
    """Return a label that fits."""
    return text if len(text) <= limit else text[: limit - 1].rsplit(" ", 1)[0] + " …"


if __name__ == "__main__":
    run_experiment(main)

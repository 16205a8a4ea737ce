"""What every experiment shares, shown with a toy: failed rows, resuming, workers, files, the command line."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cupaged.bench import scripts
from cupaged.bench.experiment import Experiment, run
from cupaged.bench.partial import Partial
from cupaged.bench.scripts import all_experiments, experiment_scripts, load_experiment

ROOT = Path(__file__).resolve().parents[2]

TOY = '''"""How fast do toys run?

A second line that only --help shows.
"""

import os
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np

from cupaged.bench.experiment import Experiment, run_script
from cupaged.bench.report import new_figure, save_figure


class Toy(Experiment):
    expectation, claim = "Expect: squares.", "Others say: cubes."
    runs_on, spreads = "cpu", True

    def add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--base", type=int, default=2)
        parser.add_argument("--hang-at", type=int, default=-1)
        parser.add_argument("--diary", type=Path)

    def set_up(self):
        if self.options.base < 0:
            raise ValueError(f"base must be at least 0, got {self.options.base}")

    def measure_once(self):
        return {"found_first": time.time()}

    def cells(self):
        return [{"number": n} for n in range(4 if self.smoke else 8)]

    def measure(self, cell):
        n = cell["number"]
        if self.options.diary:
            with self.options.diary.open("a") as file:
                file.write(f"{n} {os.getpid()}\\n")
        if n == self.options.hang_at:
            time.sleep(60)
        time.sleep(0.02 * (8 - n))  # later cells are done sooner
        if n == 1:
            raise ValueError(f"no {n} at /some/folder/of/mine.txt")
        return {"status": "ok", "square": np.float32(0.1) * n**2, "count": np.int64(n), "odd": np.nan if n == 2 else 1,
                "_pair": (n, n)}

    def compare(self, rows):
        good = [row for row in rows if row["status"] == "ok"]
        return [row | ({"of_last": row["square"] / good[-1]["square"]} if row in good else {}) for row in rows]

    def columns(self):
        return {"number": "number", "square": "square|.2f", "status": "status"}

    def conclusion(self, rows):
        return f"Found: {sum(row['status'] == 'ok' for row in rows)} of {len(rows)}."

    def notes(self, rows):
        return {"base": self.options.base, **self.once}

    def draw(self, rows, path):
        assert all(row["_pair"] == [row["number"]] * 2 for row in rows if row["status"] == "ok")
        figure, axis = new_figure()
        axis.plot([row.get("square", 0) for row in rows])
        save_figure(figure, path)


EXPERIMENT = Toy()

if __name__ == "__main__":
    run_script(EXPERIMENT)
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(TOY)
    return path


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "CUPAGED_COMMIT": "1234"}


def start(toy, *arguments):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(toy), *map(str, arguments)], env=environment(), **pipes)


def answer(toy, *arguments, status):
    process = start(toy, *arguments)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == status, printed + errors
    assert "Traceback" not in errors
    return printed, errors


def results(folder):
    document = json.loads((folder / "toy.json").read_text())
    return document, (folder / "toy.csv").read_text()


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A run that nothing cut."""
    out = tmp_path_factory.mktemp("whole")
    printed, _ = answer(toy, "--out", out, status=1)
    return printed, *results(out), out


def test_a_run_says_what_to_expect_first_and_writes_everything(whole):
    printed, document, table, out = whole
    order = [printed.index(text) for text in ("Expect: squares.", "How fast do toys run?", "Found: 6 of 8.", "Others")]
    assert order == sorted(order)
    assert document["experiment"] == "toy" and document["stamp"]["commit"] == "1234"
    assert document["conclusion"] == "Found: 6 of 8." and document["base"] == 2
    assert list(document)[-1] == "rows"
    assert (out / "toy.png").read_bytes()[:4] == b"\x89PNG" and "table, JSON and picture" in printed
    assert sorted(path.name for path in out.iterdir()) == ["toy.csv", "toy.json", "toy.png"]
    assert len(list(csv.DictReader(table.splitlines()))) == 8 and "_pair" not in table


def test_a_cell_that_fails_is_a_row_with_the_reason(whole):
    rows = whole[1]["rows"]
    assert rows[1] == {"number": 1, "status": "failed: no 1 at mine.txt"}
    assert rows[2] == {"number": 2, "status": "failed: odd is nan"}
    assert [row["number"] for row in rows] == list(range(8))
    assert rows[7]["of_last"] == 1 and rows[3] == pytest.approx(
        {"number": 3, "status": "ok", "square": 0.9, "count": 3, "odd": 1, "of_last": 9 / 49}
    )


def test_workers_give_the_same_rows_in_the_same_order(toy, whole, tmp_path):
    answer(toy, "--workers", 3, "--out", tmp_path, "--diary", tmp_path / "diary", status=1)
    document, table = results(tmp_path)
    assert document["rows"] == whole[1]["rows"] and table == whole[2]
    lines = [line.split() for line in (tmp_path / "diary").read_text().splitlines()]
    assert sorted(int(number) for number, _ in lines) == list(range(8))
    assert 1 < len({process for _, process in lines}) <= 3


@pytest.mark.parametrize(("cut", "workers"), [(signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGINT, 2)])
def test_a_run_that_was_cut_goes_on_and_gives_the_same_table(cut, workers, toy, whole, tmp_path):
    diary = tmp_path / "diary"
    process = start(toy, "--workers", workers, "--hang-at", 5, "--out", tmp_path, "--diary", diary)
    partial, deadline = tmp_path / "toy.partial.jsonl", time.monotonic() + 60
    hangs = lambda: diary.exists() and any(line.startswith("5 ") for line in diary.read_text().splitlines())  # noqa: E731
    while not (hangs() and len(partial.read_text().splitlines()) == (6 if workers == 1 else 8)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(cut)
    printed, errors = process.communicate(timeout=60)
    assert not (tmp_path / "toy.json").exists()
    if cut != signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in errors
        assert f"stopped after {5 if workers == 1 else 7} of 8 cells; the same command with --resume goes on" in printed
    first = json.loads(partial.read_text().splitlines()[0])["once"]
    diary.unlink()
    cut_line = json.dumps({"cell": 6, "rows": []})[:-4]
    partial.write_text(partial.read_text() + cut_line)  # as a full disk or a kill leaves it
    partial.write_text(partial.read_text().replace('"hang_at": "5"', '"hang_at": "-1"'))
    answer(toy, "--resume", "--workers", workers, "--out", tmp_path, "--diary", diary, status=1)
    document, table = results(tmp_path)
    assert document["rows"] == whole[1]["rows"] and table == whole[2]
    assert document["found_first"] == first["found_first"]  # what rows are held to is that of the rows
    again = {int(line.split()[0]) for line in diary.read_text().splitlines()}
    assert again == ({5, 6, 7} if workers == 1 else {5}) and not partial.exists()


def refused(toy, capsys, *arguments):
    """Return what is said about arguments that are a mistake."""
    with pytest.raises(SystemExit) as stopped:
        load_experiment(toy).main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_run_does_not_go_on_with_the_rows_of_another(toy, tmp_path, capsys, monkeypatch):
    partial = tmp_path / "toy.partial.jsonl"
    assert "argument --resume: there is no" in refused(toy, capsys, "--resume", "--out", tmp_path)
    Partial(partial, {}).begin({})
    assert "is not the file of a stopped run" in refused(toy, capsys, "--resume", "--out", tmp_path)
    experiment = load_experiment(toy)

    def interrupted(cell):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "rows", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        experiment.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "starting over" in printed and "stopped after 0 of 8 cells" in printed
    assert "--resume goes on" not in printed  # there is nothing to go on with
    said = refused(toy, capsys, "--resume", "--base", 3, "--out", tmp_path)
    assert "the stopped run differs: its base is '2', this run's '3'" in said
    monkeypatch.setenv("CUPAGED_COMMIT", "later")
    assert "its commit is" in refused(toy, capsys, "--resume", "--out", tmp_path)


def test_a_mistake_in_the_arguments_is_a_sentence(toy, tmp_path, capsys):
    assert "base must be at least 0, got -1" in refused(toy, capsys, "--base", -1, "--out", tmp_path)
    assert "argument --workers: expected a whole number" in refused(toy, capsys, "--workers", 0)


def test_a_smoke_run_is_smaller(toy, tmp_path):
    assert load_experiment(toy).main(["--smoke", "--out", str(tmp_path)]) == 1
    assert len(results(tmp_path)[0]["rows"]) == 4


def test_help_tells_the_question(toy, capsys):
    with pytest.raises(SystemExit):
        load_experiment(toy).main(["--help"])
    printed = capsys.readouterr().out
    for text in ("How fast do toys run?", "A second line", "--smoke", "--out", "--resume", "--workers", "--hang-at"):
        assert text in printed
    assert "--backend" not in printed  # it runs no kernel


class Several(Experiment):
    """Cells of two rows, in this process."""

    name, question, runs_on = "several", "?", "cpu"
    stop_at, broken_at = 9, 9

    def cells(self):
        return [0, 1, 2]

    def what(self, cell):
        return {"cell": cell}

    def rows(self, cell):
        if cell == self.stop_at:
            raise KeyboardInterrupt
        if cell == self.broken_at:
            raise MemoryError("too large")
        return [{"cell": cell, "part": part, "status": "ok"} for part in "ab"]

    def columns(self):
        return {"cell": "cell"}

    def conclusion(self, rows):
        return f"{len(rows)} rows"

    def notes(self, rows):
        return {}


def test_a_cell_may_have_several_rows_and_fail_before_the_first(tmp_path, capsys):
    toy = Several()
    toy.broken_at = 1
    assert run(toy, ["--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "several.json").read_text())["rows"]
    assert [(row["cell"], row.get("part")) for row in rows] == [(0, "a"), (0, "b"), (1, None), (2, "a"), (2, "b")]
    assert rows[2]["status"] == "failed: too large"
    printed = capsys.readouterr().out
    assert "not ok: failed: too large" in printed and "no picture" in printed


def test_what_was_measured_is_kept_only_where_the_experiment_says_so(tmp_path):
    toy = Several()
    toy.stop_at = 2
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(toy, ["--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.json")) and (tmp_path / "several.partial.jsonl").exists()
    toy.keeps_what_was_measured = True
    assert run(toy, ["--out", str(tmp_path)]) == 1
    assert len(json.loads((tmp_path / "several_stopped.json").read_text())["rows"]) == 4
    assert signal.getsignal(signal.SIGTERM) == before
    toy.stop_at = 9
    assert run(toy, ["--resume", "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "several.json").read_text())["rows"]) == 6


def test_a_gpu_measures_one_cell_at_a_time(monkeypatch, capsys):
    toy = Several()
    toy.spreads, toy.choose_backend = True, lambda: "cuda"
    with pytest.raises(SystemExit) as stopped:
        run(toy, ["--workers", "2"])
    assert stopped.value.code == 2 and "on a GPU they run one at a time" in capsys.readouterr().err


def test_a_value_that_has_no_form_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="a row holds set"):
        Partial(tmp_path / "x", {}).add(0, [{"a": {1}}])


def test_every_script_with_an_experiment_is_found_by_its_name():
    names = experiment_scripts().keys()
    assert {"layouts", "claims", "run_all"} <= names
    found = all_experiments()
    assert all(each.name in names and each.question and each.runs_on in ("gpu", "both", "cpu") for each in found)
    assert len({each.name for each in found}) == len({each.place for each in found}) == len(found) > 0
    assert [each.place for each in found] == sorted(each.place for each in found)


def command(*arguments, status):
    process = subprocess.run(
        [sys.executable, "-m", "cupaged", "experiment", *arguments],
        capture_output=True, text=True, env=environment(), timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert process.returncode == status, process.stdout + process.stderr
    return process.stdout, process.stderr


def test_the_command_line_runs_an_experiment_by_name(tmp_path):
    printed, _ = command("layouts", "--help", status=0)
    assert "Does the layout of the KV cache matter" in printed and "--smoke" in printed


@pytest.mark.parametrize("arguments", [("layout",), ()])
def test_an_unknown_name_is_answered_with_the_known_ones(arguments):
    _, errors = command(*arguments, status=2)
    assert "bookkeeping" in errors and "layouts" in errors and "Traceback" not in errors


def test_without_scripts_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scripts, "experiment_scripts", dict)
    assert scripts.run_named("layouts", []) == 2
    assert "a wheel holds the package alone" in capsys.readouterr().err

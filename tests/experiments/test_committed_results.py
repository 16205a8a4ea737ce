"""Results of earlier runs stay readable: each experiment shows, concludes from and draws what is committed of it."""

import json

import pytest

from cupaged.bench import experiment as module
from cupaged.bench.experiment import begin
from cupaged.bench.scripts import all_experiments, experiment_scripts, load_experiment
from tests.kit.experiments import ROOT

FOUND_ONCE = ("read_ceiling_gb_s", "copy_ceiling_gb_s", "launch_costs", "not_counted")
RESULTS = ROOT / "experiments" / "results"
NAMES = [each.name for each in all_experiments()]
FILES = [
    pytest.param(name, path, id=f"{path.parent.name}-{path.stem}")
    for name in NAMES
    for path in sorted(RESULTS.glob(f"*/{name}*.json"))
    if path.stem == name or path.stem.startswith("peers_")
]
NOT_DRAWN = {"fragmentation", "eviction"}  # maps of memory and single times, which no file holds


def of(name, path, monkeypatch):
    """Return an experiment as it stands when it reports what a committed file holds, and the file's rows."""
    document = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.setattr(module, "choose_backend", lambda asked: document["stamp"]["backend"])
    experiment = load_experiment(experiment_scripts()[name])
    begin(experiment, [])
    experiment.stamp = document["stamp"]
    experiment.once = {key: document[key] for key in FOUND_ONCE if key in document}
    experiment.verdicts = document.get("verdicts")
    if not hasattr(experiment, "model"):
        experiment.model = document.get("model")
    rows = [{"status": "ok", **row} for row in document["rows"]]  # the first files say so by no word
    if name == "eviction":
        rows += json.loads(path.with_name("eviction_latency.json").read_text(encoding="utf-8"))["rows"]
    return experiment, rows, document


@pytest.mark.parametrize(("name", "path"), FILES)
def test_a_committed_result_is_shown_concluded_from_and_drawn(name, path, tmp_path, monkeypatch, capsys):
    experiment, rows, document = of(name, path, monkeypatch)
    experiment.show(rows)
    assert len(capsys.readouterr().out.splitlines()) > 5
    assert experiment.went_well(rows)
    assert len(experiment.conclusion(rows)) > 50
    assert document.keys() - {"experiment", "stamp", "rows", "conclusion"} <= experiment.notes(rows).keys()
    if name not in NOT_DRAWN:
        experiment.draw(rows, tmp_path / f"{path.stem}.png")
        assert (tmp_path / f"{path.stem}.png").exists() == path.with_suffix(".png").exists()


def test_there_are_results_of_every_experiment():
    assert {param.values[0] for param in FILES} == set(NAMES)

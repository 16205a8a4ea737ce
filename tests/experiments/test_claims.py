"""The claims page: results are found, missing ones are made, and the page says where each came from."""

import json

import pytest

from cupaged.bench.claims import CLAIMS
from cupaged.runtime.select import why_no_gpu
from tests.kit.experiments import document, functions, run


def test_committed_results_become_a_page(tmp_path):
    printed, _ = run("claims", "--out", str(tmp_path))
    result = document(tmp_path, "claims")
    assert [row["name"] for row in result["rows"]] == [claim.name for claim in CLAIMS]
    page = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert sum(line.startswith("| ") for line in page.splitlines()) == len(CLAIMS) + 1
    for row in result["rows"]:
        assert row["statement"] in page and f"**{row['verdict']}**" in page and row["command"] in page
        assert (row["measured"] is None) == (row["verdict"] == "could not be measured here")
    assert f"Of {len(CLAIMS)} claims:" in printed


def test_without_results_claims_that_need_a_gpu_say_so(tmp_path):
    printed, _ = run("claims", "--out", str(tmp_path / "out"), "--results", str(tmp_path))
    rows = {row["name"]: row for row in document(tmp_path / "out", "claims")["rows"]}
    assert rows["70B"]["verdict"] == "does not hold" and rows["paging"]["reason"].endswith("it needs a GPU")
    assert rows["utilisation"]["verdict"] == "could not be measured here"
    assert "For want of a GPU: requests served, swap, texture 5x" in printed.replace("\n", " ")


@pytest.mark.skipif(why_no_gpu() is None, reason="would run every experiment on the GPU")
def test_missing_results_are_made(tmp_path):
    printed, _ = run("claims", "--run", "--smoke", "--out", str(tmp_path / "out"), "--results", str(tmp_path))
    rows = {row["name"]: row for row in document(tmp_path / "out", "claims")["rows"]}
    assert rows["utilisation"]["verdict"] in ("holds", "does not hold") and rows["sharing"]["measured"]
    assert (
        "Smoke run" in (tmp_path / "out" / "claims.md").read_text(encoding="utf-8") and "For want of a GPU" in printed
    )


@pytest.mark.parametrize("text", ["", '{"rows": [', "[]", '{"rows": []}', '{"stamp": null}', '"cuda"'])
def test_a_file_that_is_no_result_is_named(text, tmp_path):
    script = functions("claims")
    claim = next(claim for claim in CLAIMS if claim.experiment)
    (tmp_path / f"{claim.experiment}.json").write_text(text)
    with pytest.raises(OSError, match=f"{claim.experiment}.json is no result of an experiment: "):
        script["find"](claim, [tmp_path])


def test_what_was_made_now_goes_before_what_was_committed(tmp_path):
    script = functions("claims")
    for name, device in (("out", "new"), ("results/dev", "own"), ("results/other", "old")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = json.dumps({"stamp": {"backend": "cuda", "device": device}, "rows": []})
        (folder / "decode.json").write_text(text, encoding="utf-8")
    (claim,) = (claim for claim in CLAIMS if claim.experiment == "decode")
    for expected in ("new", "own", "old"):
        folders = script["search_folders"](tmp_path / "out", tmp_path / "results", "dev")
        found, path = script["find"](claim, folders)
        assert found["stamp"]["device"] == expected
        path.write_text(json.dumps({"stamp": {"backend": "host"}}), encoding="utf-8")
    assert script["find"](claim, folders) is None


def test_a_failed_experiment_is_said(tmp_path, monkeypatch):
    script = functions("claims")
    monkeypatch.setitem(script["run_missing"].__globals__, "HERE", tmp_path)
    failures = script["run_missing"]([tmp_path], tmp_path, smoke=True)
    assert failures and all("failed with status 2" in failure for failure in failures)

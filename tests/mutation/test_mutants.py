"""The mutants stay in step with the code, and the committed table with the mutants; the mutants themselves are slow."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutation.mutants import MUTANTS
from tests.mutation.run import EXPLAINED, KILLED, LIVES, PROJECT, Copy, judged, main

RESULTS = Path(__file__).with_name("RESULTS.md")
A_HANDFUL = ["pool: pressure a block late", "manager: a fork shares without priority", "softmax: a sum is not rescaled"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_old_text_occurs_once(mutant):
    text = (PROJECT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old


def test_names_are_unique():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_the_tests_that_are_named_exist():
    """Pytest refuses what it does not find; each name must also select a test that runs without a GPU."""
    named = sorted({test for mutant in MUTANTS for test in mutant.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not gpu and not slow", *named]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    collected = answer.stdout.splitlines()
    for test in named:
        file, _, name = test.partition("::")
        assert any(re.match(rf"{re.escape(file)}::{re.escape(name)}", line) for line in collected), test


def test_the_committed_table_is_of_these_mutants_and_none_lives():
    rows = [line.split(" | ") for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[1:]] == [mutant.name for mutant in MUTANTS]
    for row, mutant in zip(rows[1:], MUTANTS, strict=True):
        assert row[3] == (EXPLAINED if mutant.equivalent else KILLED)


def test_what_an_exit_status_means_for_a_mutant():
    mutant = replace(MUTANTS[0], equivalent="")
    failed = "FAILED tests/test_a.py::test_b[x - y] - AssertionError: no\n1 failed in 0.1s"
    assert judged(mutant, 1, failed, 1.0).detail == "tests/test_a.py::test_b[x - y]"
    assert judged(mutant, 1, failed, 1.0).is_right
    assert judged(mutant, 0, "1 passed", 1.0).verdict == LIVES
    assert judged(mutant, None, "", 1.0).is_right  # it hangs
    assert judged(mutant, -11, "", 1.0).is_right  # it crashes
    assert not judged(mutant, 4, "ERROR: not found", 1.0).is_right
    assert not judged(mutant, 1, "E   cupaged.errors.KernelBuildError: no\n" + failed, 1.0).is_right
    assert not judged(mutant, 2, "E     SyntaxError: no\nERROR tests/test_a.py", 1.0).is_right
    explained = replace(mutant, equivalent="it changes nothing")
    assert judged(explained, 0, "1 passed", 1.0).is_right
    assert not judged(explained, 1, failed, 1.0).is_right


def test_an_old_text_that_is_gone_is_stale(tmp_path):
    copy = Copy(tmp_path / "copy", tmp_path / "kernels")
    outcome = copy.try_out(replace(MUTANTS[0], old="no such text"))
    assert (outcome.verdict, outcome.detail) == ("STALE", "its old text is found 0 times")


@pytest.mark.slow
@pytest.mark.parametrize("name", A_HANDFUL)
def test_a_mutant_is_dead_or_explained(name):
    assert main(["--only", name]) == 0

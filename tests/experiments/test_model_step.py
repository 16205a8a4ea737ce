"""The decode-step experiment runs from end to end, and another result is seen."""

import numpy as np
import pytest

from tests.kit.experiments import document, functions, run


def test_without_a_gpu_the_ways_agree(tmp_path):
    printed, _ = run("model_step", "--smoke", "--backend", "host", "--out", str(tmp_path))
    result = document(tmp_path, "model_step", picture=False)
    assert [(row["way"], row["status"]) for row in result["rows"]] == [("one graph", "ok")]
    assert "Found: every way chooses the same tokens." in printed


def test_logits_that_are_too_far_apart_are_seen():
    agreement = functions("model_step")["agreement"]
    expected = np.array([4.0, -8.0])
    half = np.dtype(np.float16)
    assert agreement(expected + 0.1, expected, half) == "ok"
    assert agreement(expected + 0.2, expected, half).startswith("wrong: logits are 0.2 apart")
    assert agreement(expected + 0.1, expected, np.dtype(np.float32)).startswith("wrong")


def test_the_conclusion_compares_the_ways():
    rows = [
        {"way": "one graph", "ms": 2.0},
        {"way": "attention alone, one graph", "ms": 0.5},
        {"way": "transformers", "ms": 20.0},
    ]
    conclusion = functions("model_step")["conclusion"](rows)
    assert (
        conclusion
        == "Found: a step takes 2.00 ms as a graph, of which attention is 25%; transformers: 10.0 times as long."
    )


@pytest.mark.gpu
def test_on_a_gpu_the_step_is_timed(tmp_path):
    run("model_step", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    rows = {row["way"]: row for row in document(tmp_path, "model_step")["rows"]}
    assert rows["one graph"]["status"] == "ok" and rows["one graph"]["ms"] > 0
    assert rows["attention alone, one graph"]["ms"] < rows["one graph"]["ms"]

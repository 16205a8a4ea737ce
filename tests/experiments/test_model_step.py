"""The decode-step experiment runs from end to end, and another result is seen."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cupaged.engine.weights import random_checkpoint
from tests.kit.experiments import document, functions, run
from tests.kit.llama import SMALL, half_budget, logits_budget


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


def test_logits_are_held_to_what_a_peer_of_the_same_precision_loses():
    as_close = functions("model_step")["as_close"]
    exact = np.tile([4.0, -8.0], (3, 1))

    def off_by(*lost):
        return as_close(exact + np.transpose([lost]), exact - 0.1, exact)

    assert {off_by(0.19, 0.19, 0.19), off_by(0.9, 0.09, 0.09), off_by(0.1, 0, 0.1)} == {"ok"}
    assert as_close(exact, exact, exact) == "ok"
    assert off_by(0.9, 0, 0.9) == "wrong: logits are 9 times as far off as the peer's, in a sequence 9 times"
    assert off_by(0.21, 0.21, 0.21) == "wrong: logits are 2.1 times as far off as the peer's, in a sequence 2.1 times"
    assert off_by(1.1, 0.01, 0.01) == "wrong: logits are 0.1 times as far off as the peer's, in a sequence 11 times"
    assert off_by(0.1, np.nan, 0.1).startswith("wrong")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_has_the_same_model(dtype):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    checkpoint = random_checkpoint(replace(SMALL, rope_base=5e5))
    text = np.random.default_rng(0).integers(SMALL.vocab_size, size=300)
    model = functions("model_step")["as_transformers"](checkpoint, dtype, "cpu")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # else far tokens turn by the wrong angle
    with torch.inference_mode():
        past = model(torch.from_numpy(text[None, :-1]), use_cache=True, logits_to_keep=1).past_key_values
        last = model(torch.from_numpy(text[None, -1:]), past_key_values=past, use_cache=True).logits[0, -1]
    exact, budget = logits_budget(checkpoint, text)
    if dtype == "bfloat16":
        budget = half_budget(checkpoint, text, ml_dtypes.bfloat16)
    assert np.abs(last.float().numpy() - exact[-1]).max() <= budget


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

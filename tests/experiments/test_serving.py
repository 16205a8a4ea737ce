"""The serving experiment runs from end to end, and what it says of contiguous reservation and paging is so."""

import numpy as np
import pytest

from tests.kit.experiments import document, functions, run

CONTIGUOUS, PAGED, SHARED = "contiguous", "paged", "paged, prefixes shared"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    printed, _ = run("serving", "--smoke", "--backend", "host", "--out", str(folder))
    return printed, document(folder, "serving")


def test_every_answer_is_the_same_and_paging_serves_more_at_once(smoke):
    printed, result = smoke
    rows = result["rows"]
    assert [row["way"] for row in rows] == [CONTIGUOUS, PAGED, PAGED, SHARED, SHARED]
    assert all(row["status"] == "ok" for row in rows)
    contiguous, *paged = rows
    assert contiguous["most_at_once"] == result["config"]["slots"] // result["config"]["longest"]
    assert all(row["at_once"] > contiguous["at_once"] and row["at_once_gain"] > 1 for row in paged)
    assert contiguous["hit_rate"] == 0 and rows[3]["hit_rate"] > 0
    assert all(row["occupancy"] > contiguous["occupancy"] for row in paged)
    assert printed.index("What to expect") < printed.index("Found:") < printed.index("The documents:")
    assert result["unit"] == "step" and result["conclusion"].startswith("Found: contiguous reservation serves")


def test_a_resumed_run_compares_with_the_answers_from_before(smoke, tmp_path, monkeypatch):
    arguments = ["--smoke", "--backend", "host", "--out", str(tmp_path)]
    experiment, rows_of_a_cell = functions("serving")["EXPERIMENT"], []

    def rows(cell):
        if rows_of_a_cell:
            raise KeyboardInterrupt
        rows_of_a_cell.extend(type(experiment).rows(experiment, cell))
        return rows_of_a_cell

    monkeypatch.setattr(experiment, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        experiment.main(arguments)
    resumed = functions("serving")["EXPERIMENT"]
    assert resumed.main([*arguments, "--resume"]) == 0
    assert resumed.answers == experiment.answers and document(tmp_path, "serving")["rows"] == smoke[1]["rows"]


def test_requests_that_come_over_time_wait_less(tmp_path, smoke):
    run("serving", "--smoke", "--backend", "host", "--rate", "0.05", "--out", str(tmp_path))
    rows, at_once = document(tmp_path, "serving")["rows"], smoke[1]["rows"]
    assert all(row["status"] == "ok" for row in rows)
    assert all(row["first_token"] < all_row["first_token"] for row, all_row in zip(rows, at_once, strict=True))


def test_block_sizes_and_requests_are_the_callers(tmp_path):
    run("serving", "--smoke", "--backend", "host", "--block-sizes", "4", "--requests", "3", "--out", str(tmp_path))
    result = document(tmp_path, "serving")
    assert [(row["way"], row["block_size"]) for row in result["rows"]] == [(CONTIGUOUS, None), (PAGED, 4), (SHARED, 4)]
    assert all(row["status"] == "ok" for row in result["rows"]) and result["config"]["requests"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "0"), "argument --rate: expected a finite number above 0, got '0'"),
        (("--rate", "nan"), "argument --rate: expected a finite number above 0, got 'nan'"),
        (("--requests", "0"), "argument --requests: expected a whole number of at least 1, got '0'"),
        (("--block-sizes", "8", "0"), "argument --block-sizes: expected a whole number of at least 1, got '0'"),
        (("--trace", "wrong.csv"), "wrong.csv, line 2, column 'num_decode_tokens': expected a whole number of tokens"),
        (("--trace", "failed.csv"), "failed.csv: expected a request that generates at least one token, got none"),
    ],
)
def test_mistakes_are_a_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    header = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
    (tmp_path / "wrong.csv").write_text(f"{header}0,1,x\n")
    (tmp_path / "failed.csv").write_text(f"{header}0,0,0\n1,5,0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        functions("serving")["EXPERIMENT"].main(["--smoke", "--backend", "host", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_failed_requests_of_a_trace_are_not_served(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,96,48\n1,0,0\n2,480,0\n3,480,96\n")
    trace = functions("serving")["trace_of"](path, 4)
    assert trace.prompt_tokens.tolist() == [96, 480] and trace.output_tokens.tolist() == [48, 96]


def test_a_gain_over_nothing_is_none():
    script = functions("serving")
    base, way = {"at_once": 0.0, "tokens_per_unit": 2.0}, {"at_once": 3.0, "tokens_per_unit": 3.0}
    assert script["gains"](way, base) == {"at_once_gain": None, "throughput_gain": 1.5}
    rows = [
        {"way": name, "status": "ok", "block_size": 16, **way, **script["gains"](way, base)}
        for name in (CONTIGUOUS, PAGED)
    ]
    assert script["conclusion"](rows) == "Found: contiguous reservation serves 3.0 requests at once."


def test_a_load_has_the_lengths_of_its_trace_and_common_beginnings():
    script = functions("serving")
    config = script["CONFIGS"]["host", True]
    trace = script["sample_trace"](40)
    load = script["load_of"](trace, config, 100)
    for prompt, given in zip(load.prompts, trace.prompt_tokens // config.shorten, strict=True):
        assert len(prompt) == np.clip(given, 1, config.longest - 1)
    assert all(
        len(prompt) + output <= config.longest for prompt, output in zip(load.prompts, load.output_tokens, strict=True)
    )
    beginnings = {tuple(prompt[:16]) for prompt in load.prompts if len(prompt) > 16}
    assert len(beginnings) == config.system_prompts < sum(len(prompt) > 16 for prompt in load.prompts)


def test_another_answer_is_seen():
    script = functions("serving")
    llm = script["pg"].LLM(script["random_checkpoint"](script["SMALL"]), backend="host", num_blocks=4)
    load = script["Load"]((np.zeros(3, np.int32),), np.array([2]), np.zeros(1))
    assert script["verdict_on"](llm, [[1, 2]], load, [], exact=True) == "ok"
    assert "answers differ" in script["verdict_on"](llm, [[1, 2]], load, [[1, 3]], exact=True)
    assert script["verdict_on"](llm, [[1, 2]], load, [[1, 3]], exact=False) == "ok"
    assert "all of its tokens" in script["verdict_on"](llm, [[1]], load, [], exact=True)
    llm.manager.allocate("left behind", 3)
    assert "left behind" in script["verdict_on"](llm, [[1, 2]], load, [], exact=True)


def test_without_contiguous_reservation_there_is_nothing_to_compare():
    script = functions("serving")
    assert "nothing to compare" in script["conclusion"]([{"way": CONTIGUOUS, "status": "failed: x"}])


@pytest.mark.gpu
def test_on_a_gpu_time_is_measured(tmp_path):
    run("serving", "--smoke", "--backend", "cuda", "--out", str(tmp_path))
    result = document(tmp_path, "serving")
    assert result["unit"] == "second" and all(row["status"] == "ok" for row in result["rows"])

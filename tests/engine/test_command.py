"""``python -m cupaged generate``, as a reader runs it."""

import dataclasses
import io
import os
import subprocess
import sys

import numpy as np
import pytest

import cupaged as pg
from cupaged.__main__ import main
from cupaged.engine import command
from cupaged.engine.weights import random_checkpoint
from tests.kit.llama import SMALL, byte_tokenizer, write_gguf
from tests.kit.real_model import smollm2


def test_it_answers_and_says_what_it_took(capsys):
    smollm2()
    assert main(["generate", "Say hello.", "--tokens", "5", "--stats", "--backend", "host"]) == 0
    printed, said = capsys.readouterr()
    assert (
        said
        == "attention: the reference in NumPy, which is faster here; --kernels runs the .cu files, thread by thread\n"
    )
    answer, summary = printed.split("\n\n")
    assert len(answer) > 5
    words = {line.split("  ")[0]: line for line in summary.splitlines()}
    assert list(words) == ["blocks in use", "token occupancy", "prefix hits", "copies", "steps", "time"]
    assert "3 of 256, 16 tokens each; 3 at most" in words["blocks in use"]
    assert "0 of 33 prompt tokens" in words["prefix hits"]
    assert "5 for 5 tokens" in words["steps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["Hi", "--model", "nowhere.gguf"],
            "FileNotFoundError: model must be a GGUF file; there is none at nowhere.gguf",
        ),
        (["Hi", "--tokens", "0"], "ValueError: max_tokens must be at least 1"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["generate", *arguments, "--backend", "host"]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_an_empty_prompt_is_named(capsys):
    smollm2()
    assert main(["generate", "", "--raw", "--backend", "host"]) == 2
    assert "ValueError: prompt must hold at least one token; got none" in capsys.readouterr().err


def small_model(path, tensors=(), **given):
    """Write a model that speaks in random bytes."""
    for package in ("gguf", "tokenizers", "jinja2"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    config = dataclasses.replace(SMALL, vocab_size=261)
    metadata = {key: value for key, value in given.items() if "." in key}
    given = {name: value for name, value in given.items() if name not in metadata}
    written = {**byte_tokenizer(**{"template": "{{ messages[0].content }}", **given}), **metadata}
    return write_gguf(path / "small.gguf", random_checkpoint(config, seed=3), written.items(), tensors)


def ask(model, *more):
    return main(["generate", "Hi", "--model", str(model), "--backend", "host", "--tokens", "40", *more])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_answer_is_printed_on_any_terminal(tmp_path, monkeypatch, encoding):
    model, written = small_model(tmp_path), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    assert ask(model) == 0
    (answer,) = pg.LLM(model, backend="host").generate(["Hi"], pg.SamplingParams(40), chat=True)
    assert "\ufffd" in answer.text
    assert written.getvalue() == (answer.text + "\n").encode(encoding, "backslashreplace")


@pytest.mark.parametrize("command", [["generate", "Hé", "--raw", "--tokens", "20", "--stats"], ["doctor"]])
def test_commands_run_on_an_ascii_terminal(tmp_path, command):
    more = ["--model", str(small_model(tmp_path)), "--backend", "host"] if command[0] == "generate" else []
    told = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ran = subprocess.run([sys.executable, "-m", "cupaged", *command, *more], capture_output=True, env=told)
    assert ran.returncode == 0 and b"Error" not in ran.stderr and ran.stdout.isascii()


@pytest.mark.parametrize(
    ("given", "tensors", "message"),
    [
        ({"llama.context_length": None}, (), "ValueError: model must say llama.context_length; the file does not"),
        ({"llama.rope.scale_linear": 4.0}, (), "UnsupportedError: model must have plain rotary angles; "),
        ({"merges": None}, (), "ValueError: tokenizer.ggml.merges must be a list of str"),
        ({"eos_token_id": 999}, (), "ValueError: tokenizer.ggml.eos_token_id must be a token id below 261"),
        ({"template": "{% if %}"}, (), "ValueError: tokenizer.chat_template cannot be read: "),
        ({"template": "{{ messages[7]['content'].x }}"}, (), "ValueError: tokenizer.chat_template cannot write these"),
        ({"template": None}, (), "UnsupportedError: chat needs a tokenizer.chat_template; the file has none"),
        ({}, [("output_norm.weight", None)], "ValueError: model must have the tensor output_norm.weight"),
        ({"model": None, "tokens": None}, (), "TypeError: stream needs a model with a tokenizer"),
    ],
)
def test_a_bad_model_is_one_sentence(tmp_path, capsys, given, tensors, message):
    assert ask(small_model(tmp_path, tensors, **given)) == 2
    printed, said = capsys.readouterr()
    assert said.splitlines()[-1].startswith(message) and "Traceback" not in said and printed == ""


@pytest.mark.parametrize("contents", [b"", b"GGUF", b"no model at all", b"GGUF" + bytes(range(200))])
def test_a_file_that_is_no_model_is_one_sentence(tmp_path, capsys, contents):
    (tmp_path / "bad.gguf").write_bytes(contents)
    assert ask(tmp_path / "bad.gguf") == 2
    said = capsys.readouterr().err
    assert said.startswith("ValueError: model must be a whole GGUF file; ") and said.count("\n") == 1


@pytest.mark.parametrize(("prompt", "blocks", "percent"), [("Hi", 1, 12.5), ("x" * 16, 1, 100.0), ("x" * 40, 3, 83.3)])
def test_an_answer_of_one_step_is_shown_with_the_blocks_that_it_had(tmp_path, capsys, prompt, blocks, percent):
    model = small_model(tmp_path)
    assert main(["generate", prompt, "--model", str(model), "--backend", "host", "--tokens", "1", "--stats"]) == 0
    printed = capsys.readouterr().out
    assert f"blocks in use     {blocks} of 256, 16 tokens each; {blocks} at most" in printed
    assert f"token occupancy   {percent}% of their slots hold a token" in printed


@pytest.mark.parametrize("error", [KeyError("llama.x"), IndexError("out of range"), AssertionError(), MemoryError("x")])
def test_whatever_goes_wrong_is_one_sentence(tmp_path, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(command, "LLM", fail)
    assert ask("any") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{type(error).__name__}: ") and said.count("\n") == 1 and len(said.split()) > 1


def test_an_answer_that_cannot_go_on_is_an_error(tmp_path, capsys):
    weights = random_checkpoint(dataclasses.replace(SMALL, vocab_size=261), seed=3)
    model = small_model(tmp_path)
    (answer,) = pg.LLM(model, backend="host").generate(["Hi"], pg.SamplingParams(40), chat=True)
    tokens = answer.tokens.tolist()
    last = next(i for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i] and token not in b"Hi")
    embedding = weights.embedding.copy()
    embedding[tokens[last]] = np.nan
    changed = [("token_embd.weight", embedding), ("output.weight", weights.embedding)]
    assert ask(small_model(tmp_path, changed)) == 2
    printed, said = capsys.readouterr()
    assert printed == pg.LLM(model, backend="host").tokenizer.decode(tokens[: last + 1]) + "\n"
    assert said.splitlines()[-1].startswith(
        f"InvalidLogitsError: the logits after its first {2 + last + 1} tokens hold NaN or have no finite largest entry"
    )


def test_numbers_beyond_float32_are_taken(tmp_path, capsys):
    model = small_model(tmp_path)
    printed = []
    for options in (["--temperature", "0"], ["--temperature", "1e-50"], ["--temperature", "1", "--top-p", "1e-50"]):
        assert ask(model, *options) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert ask(model, "--temperature", "1e300", "--top-k", str(10**30), "--seed", str(-(10**30))) == 0


def test_help_names_the_commands():
    answer = subprocess.run([sys.executable, "-m", "cupaged", "generate", "--help"], capture_output=True, text=True)
    assert answer.returncode == 0 and "--kernels" in answer.stdout and "--stats" in answer.stdout

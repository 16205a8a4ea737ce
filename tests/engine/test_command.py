"""``python -m cupaged generate``, as a reader runs it."""

import subprocess
import sys

import pytest

from cupaged.__main__ import main
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


def test_help_names_the_commands():
    answer = subprocess.run([sys.executable, "-m", "cupaged", "generate", "--help"], capture_output=True, text=True)
    assert answer.returncode == 0 and "--kernels" in answer.stdout and "--stats" in answer.stdout

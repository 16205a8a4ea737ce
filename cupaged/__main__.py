"""Command line: ``doctor`` says what this machine has, ``generate`` answers a prompt, ``experiment`` runs one."""

from __future__ import annotations

import argparse
import io
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m cupaged", description="cupaged's command line")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what was found, what works, and what to install for the rest")
    generate = commands.add_parser("generate", help="let a language model answer a prompt, from a paged cache")
    generate.add_argument("prompt", help="what to say to the model")
    generate.add_argument("--model", default=None, help="a GGUF file (default: SmolLM2-135M-Instruct, from PyPI)")
    generate.add_argument("--raw", action="store_true", help="continue the prompt instead of answering it")
    generate.add_argument("--tokens", type=int, default=64, help="the most tokens to generate (default: 64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    generate.add_argument("--top-k", type=int, default=0, help="draw from the so many most likely tokens only")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw from this share of the probability only")
    generate.add_argument("--seed", type=int, default=0, help="of the draws")
    generate.add_argument("--backend", choices=("cuda", "host"), default=None, help="default: the best that runs here")
    generate.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default=None, help="of the cache")
    generate.add_argument("--block-size", type=int, default=16, help="tokens in a block (default: 16)")
    generate.add_argument("--blocks", type=int, default=None, help="blocks in the cache")
    generate.add_argument(
        "--kernels", action="store_true", help="on the host, run the .cu files thread by thread, not the reference"
    )
    generate.add_argument("--stats", action="store_true", help="show blocks, occupancy, hits, copies, and the time")
    experiment = commands.add_parser("experiment", help="run an experiment of a checkout by its name")
    experiment.add_argument("name", nargs="?", default="", help="of its script in experiments/")
    experiment.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own; --help lists them")
    options = parser.parse_args(arguments)
    _print_any_text()

    if options.command == "doctor":
        from cupaged.doctor import doctor

        return doctor()
    if options.command == "experiment":
        from cupaged.bench.scripts import run_named

        return run_named(options.name, options.arguments)
    from cupaged.engine.command import generate as run_generate

    return run_generate(options)


def _print_any_text() -> None:
    """Let a terminal that cannot show a character show its number: a model's text may hold any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())

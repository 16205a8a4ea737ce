"""What ``python -m cupaged generate`` does: stream an answer, and say what it took."""

from __future__ import annotations

import sys
from argparse import Namespace

from cupaged.engine.generate import LLM
from cupaged.engine.sequence import SamplingParams

__all__ = ["generate"]

MISTAKE, INTERRUPTED = 2, 130
REFERENCE = "attention: the reference in NumPy, which is faster here; --kernels runs the .cu files, thread by thread"
ON_HOST = "attention: the .cu files, thread by thread on the CPU: slow, and no sign of what a GPU does"


def generate(options: Namespace) -> int:
    """Answer a prompt on the terminal; returns an exit status."""
    try:
        return _generate(options)
    except Exception as error:  # a model's file and its template come from anywhere, and may fail in any way
        print(f"{type(error).__name__}: {str(error) or 'nothing more is known'}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def _generate(options: Namespace) -> int:
    params = SamplingParams(
        options.tokens, options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
    )
    llm = LLM(
        options.model, backend=options.backend, dtype=options.dtype, num_blocks=options.blocks,
        block_size=options.block_size, use_kernels=options.kernels or None,
    )  # fmt: skip
    if llm.backend == "host":
        print(ON_HOST if options.kernels else REFERENCE, file=sys.stderr)
    llm.model.timing = options.stats
    held: dict[str, int | float] = {}
    try:
        for piece in llm.stream(options.prompt, params, chat=not options.raw):
            print(piece, end="", flush=True)
            held = llm.stats() if llm.unfinished else held
    finally:  # what is said of an error stands on a line of its own
        if held:
            print()
    if options.stats:
        print("\n" + _summary(llm, held or _when_complete(llm)))
    return 0


def _when_complete(llm: LLM) -> dict[str, int | float]:
    """Return the state of the cache when an answer that came in one piece was complete; by now its blocks are free."""
    end = llm.stats()
    stored = end["prompt_tokens"] + max(0, end["tokens_generated"] - 1)  # the last token is never stored
    slots = end["blocks_used_peak"] * llm.manager.block_size
    return {**end, "blocks_used": end["blocks_used_peak"], "token_occupancy": stored / slots}


def _summary(llm: LLM, held: dict[str, int | float]) -> str:
    """Return what an answer took: `held` is the state of the cache when it was last under way."""
    end, manager = llm.stats(), llm.manager
    seconds, attention = end["step_seconds"], end["attention_seconds"]
    others = seconds - attention
    timed = ", waited for before and after, without graphs" if llm.backend == "cuda" else ""
    lines = [
        f"blocks in use     {held['blocks_used']} of {held['blocks_total']}, {manager.block_size} tokens each; "
        f"{end['blocks_used_peak']} at most",
        f"token occupancy   {held['token_occupancy']:.1%} of their slots hold a token",
        f"prefix hits       {end['cached_tokens']} of {end['prompt_tokens']} prompt tokens",
        f"copies            {end['copies']} blocks by copy-on-write, {end['preemptions']} preemptions",
        f"steps             {end['steps']} for {end['tokens_generated']} tokens, {seconds:.2f} s: "
        f"{end['tokens_generated'] / max(seconds, 1e-9):.1f} tokens a second on {llm.backend}",
        f"time              {attention:.2f} s in attention ({attention / max(seconds, 1e-9):.0%}{timed}), "
        f"{others:.2f} s in the rest",
    ]
    return "\n".join(lines)

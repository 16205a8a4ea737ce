"""SmolLM2, where the packages that carry and read it are installed."""

from functools import cache

import pytest

from cupaged.engine.tokenizer import Tokenizer
from cupaged.engine.weights import Checkpoint, read_gguf, smollm2_path


@cache
def _load():
    checkpoint = read_gguf(smollm2_path())
    return checkpoint, Tokenizer(checkpoint.metadata)


def smollm2() -> tuple[Checkpoint, Tokenizer]:
    """Return the model and its tokenizer, or skip the test with what is missing."""
    try:
        return _load()
    except ModuleNotFoundError as error:
        pytest.skip(f"no real model here: {error}")

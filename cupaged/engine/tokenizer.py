"""Text to tokens and back, built from the vocabulary and merges that a GGUF file carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cupaged.engine.weights import INSTALL
from cupaged.errors import UnsupportedError

__all__ = ["TextStream", "Tokenizer"]

CONTROL, USER_DEFINED = 3, 4  # of GGUF's token types: those that are found in a text before it is cut
DIGITS_ALONE = ("smollm",)  # pre-tokenizers that cut as GPT-2 does, and each digit for itself
REPLACEMENT = "\ufffd"


class Tokenizer:
    """Byte-level byte pair encoding, as in the file's metadata.

    Parameters
    ----------
    metadata : mapping
        Of a `Checkpoint`.

    Attributes
    ----------
    end_token : int
        The token that ends an answer.

    Raises
    ------
    ModuleNotFoundError
        If the packages tokenizers or jinja2 are not installed.
    UnsupportedError
        If the file's tokenizer is of another kind.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
            from tokenizers import AddedToken, decoders, models, pre_tokenizers
            from tokenizers import Tokenizer as Encoder
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"text needs the packages tokenizers and jinja2: {INSTALL}") from error
        kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if kind != "gpt2" or cut not in DIGITS_ALONE:
            raise UnsupportedError(
                f"the tokenizer must be gpt2's, cut as {' or '.join(DIGITS_ALONE)}; the file says {kind!r}, cut {cut!r}"
            )
        names: list[str] = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
        encoder = Encoder(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        encoder.decoder = decoders.ByteLevel()
        kinds = metadata["tokenizer.ggml.token_type"]
        encoder.add_special_tokens(
            [AddedToken(name) for name, kind in zip(names, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
        )
        self._encoder = encoder
        self.vocab_size = len(names)
        self.end_token: int = metadata["tokenizer.ggml.eos_token_id"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(metadata.get("tokenizer.chat_template", ""))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; names of control tokens in it become these tokens."""
        return list(self._encoder.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, control tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return str(self._encoder.decode([int(token) for token in tokens]))

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> str:
        """Return a conversation as the model was trained to read it, up to where its answer begins.

        Parameters
        ----------
        messages : str or sequence of mapping
            What the user says, or entries of "role" and "content".
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return str(self._template.render(messages=list(messages), add_generation_prompt=True))


class TextStream:
    """Tokens in, text out as soon as it is whole: a character can be spread over several tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """Return the text that `token` completes, empty if it ends within a character."""
        self._held.append(token)
        text = self._tokenizer.decode(self._held)
        if text.endswith(REPLACEMENT):
            return ""
        self._held.clear()
        return text

    def finish(self) -> str:
        """Return what is held back, though it is not whole."""
        text = self._tokenizer.decode(self._held)
        self._held.clear()
        return text

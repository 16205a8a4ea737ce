"""Text to tokens and back, built from the vocabulary and merges that a GGUF file carries."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from cupaged.engine.weights import INSTALL
from cupaged.errors import UnsupportedError

__all__ = ["TextStream", "Tokenizer"]

CONTROL, USER_DEFINED = 3, 4  # of GGUF's token types: those that are found in a text before it is cut
DIGITS_ALONE = ("smollm",)  # pre-tokenizers that cut as GPT-2 does, and each digit for itself
REFUSED = ("add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap")
ENDS_OF_TURN = ("eot_token_id", "eom_token_id")
NAMED_BY_TEMPLATES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}  # name in a chat template -> key of the file, as GGUF spells it


class Tokenizer:
    """Byte-level byte pair encoding, as in the file's metadata.

    Where the file says ``add_bos_token``, a text begins with that token. A file that says ``add_eos_token`` is refused:
    a prompt that ends with the end of an answer has none to come.

    Parameters
    ----------
    metadata : mapping
        Of a `Checkpoint`.

    Attributes
    ----------
    vocab_size : int
        Tokens.
    begin_token : int or None
        The token that each text begins with; None if the file asks for none.
    end_token : int
        The token that ends an answer.

    Raises
    ------
    ModuleNotFoundError
        If the packages tokenizers or jinja2 are not installed.
    UnsupportedError
        If the file's tokenizer is of another kind, or the file says something of it that is not served.
    ValueError
        If the file lacks a key, or its vocabulary, merges and special tokens do not fit together.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        try:
            import jinja2  # noqa: F401
            from tokenizers import AddedToken, decoders, models, pre_tokenizers
            from tokenizers import Tokenizer as Encoder
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"text needs the packages tokenizers and jinja2: {INSTALL}") from error
        _refuse_other_kinds(metadata)
        names = _list_of(metadata, "tokens", str)
        kinds = _list_of(metadata, "token_type", int)
        if len(set(names)) != len(names) or len(kinds) != len(names):
            raise ValueError(
                f"tokenizer.ggml.tokens must be different names, each with a tokenizer.ggml.token_type; the file has "
                f"{len(names)} names, {len(set(names))} of them different, and {len(kinds)} types"
            )
        merges = [tuple(merge.split(" ", 1)) for merge in _list_of(metadata, "merges", str)]
        try:
            encoder = Encoder(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
        except Exception as error:  # the package raises nothing more particular
            raise ValueError(f"tokenizer.ggml.merges must be pairs of tokens: {error}") from error
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        encoder.decoder = decoders.ByteLevel()
        of_kind = {
            wanted: [
                AddedToken(name, normalized=False) for name, kind in zip(names, kinds, strict=True) if kind == wanted
            ]
            for wanted in (CONTROL, USER_DEFINED)
        }
        encoder.add_special_tokens(of_kind[CONTROL])
        encoder.add_tokens(of_kind[USER_DEFINED])
        self._encoder = encoder
        self._bytes = [_bytes_of(name, kind) for name, kind in zip(names, kinds, strict=True)]
        self._special = {
            name: names[_token_id(metadata, key, len(names))]
            for name, key in NAMED_BY_TEMPLATES.items()
            if f"tokenizer.ggml.{key}" in metadata
        }
        self._template_text = metadata.get("tokenizer.chat_template")
        self.vocab_size = len(names)
        begins = metadata.get("tokenizer.ggml.add_bos_token", False)
        self.begin_token = _token_id(metadata, "bos_token_id", len(names)) if begins else None
        self.end_token = _token_id(metadata, "eos_token_id", len(names))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; names of control tokens in it become these tokens.

        The file's `begin_token` comes first, once: not if the text itself, a chat for example, begins with it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be Unicode without lone surrogates; {error}") from error
        tokens = list(self._encoder.encode(text).ids)
        if self.begin_token is not None and tokens[:1] != [self.begin_token]:
            return [self.begin_token, *tokens]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, control tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", "replace")

    def bytes_of(self, token: int) -> bytes:
        """Return what a token stands for in UTF-8, perhaps a part of a character; nothing for a control token."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token must be a token id from 0 to {self.vocab_size - 1}; got {token}")
        return self._bytes[token]

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> str:
        """Return a conversation as the model was trained to read it, up to where its answer begins.

        Parameters
        ----------
        messages : str or sequence of mapping
            What the user says, or entries of "role" and "content".

        Raises
        ------
        UnsupportedError
            If the file has no chat template.
        ValueError
            If its template cannot be read, or refuses these messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        template = self._template
        try:
            return str(template.render(messages=list(messages), add_generation_prompt=True, **self._template_names))
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"tokenizer.chat_template cannot write these messages: {error}") from error

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self._template_text:
            raise UnsupportedError(
                "chat needs a tokenizer.chat_template; the file has none, so prompts are continued only"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        try:
            return environment.from_string(self._template_text)
        except TemplateError as error:
            raise ValueError(f"tokenizer.chat_template cannot be read: {error}") from error

    @cached_property
    def _template_names(self) -> dict[str, Any]:
        """What a template may use: names of special tokens, an error if the file has none of that name."""
        from jinja2 import StrictUndefined, TemplateError

        def refuse(message: str) -> None:
            raise TemplateError(message)

        return {
            **{name: StrictUndefined(name=name) for name in NAMED_BY_TEMPLATES},
            **self._special,
            "raise_exception": refuse,
        }


def _refuse_other_kinds(metadata: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` if a file says something of its tokenizer that would not be heeded."""
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in DIGITS_ALONE:
        raise UnsupportedError(
            f"the tokenizer must be gpt2's, cut as {' or '.join(DIGITS_ALONE)}; the file says {kind!r}, cut {cut!r}"
        )
    for name in REFUSED:
        if metadata.get(f"tokenizer.ggml.{name}"):
            raise UnsupportedError(f"tokenizer.ggml.{name} must be left out or false; it is not served")
    end = metadata.get("tokenizer.ggml.eos_token_id")
    for name in ENDS_OF_TURN:
        given = metadata.get(f"tokenizer.ggml.{name}", end)
        if given != end:
            raise UnsupportedError(
                f"tokenizer.ggml.{name} must be eos_token_id, {end}: one token ends an answer; the file says {given}"
            )


def _list_of(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    entries = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(entries, list) or not all(isinstance(entry, kind) for entry in entries):
        raise ValueError(f"tokenizer.ggml.{name} must be a list of {kind.__name__}; the file has no such list")
    return entries


def _token_id(metadata: Mapping[str, Any], name: str, vocab_size: int) -> int:
    token = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(token, int) or not 0 <= token < vocab_size:
        raise ValueError(f"tokenizer.ggml.{name} must be a token id below {vocab_size}; the file says {token!r}")
    return token


def _bytes_of(name: str, kind: int) -> bytes:
    """Return what a token of this name stands for: names are written in GPT-2's alphabet, a character for a byte."""
    if kind == CONTROL:
        return b""
    if kind == USER_DEFINED or not BYTE_OF_CHARACTER.keys() >= set(name):
        return name.encode("utf-8", "replace")
    return bytes(BYTE_OF_CHARACTER[character] for character in name)


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's alphabet: bytes that print stand for themselves, the others are characters from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class TextStream:
    """Tokens in, text out as soon as it is whole: a character can be spread over several tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the text that `token` completes, empty if it ends within a character."""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def finish(self) -> str:
        """Return what is held back, though it is not whole."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text

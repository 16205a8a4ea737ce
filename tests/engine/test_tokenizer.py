"""The tokenizer cuts as llama.cpp does, and text comes back whole."""

import time

import numpy as np
import pytest

import cupaged as pg
from cupaged.engine.tokenizer import TextStream, Tokenizer
from cupaged.engine.weights import smollm2_path
from tests.kit.llama import byte_tokenizer
from tests.kit.real_model import smollm2

TEXTS = [
    "Hello world",
    "It's 12345 o'clock\n\n  and  tabs\t\tx",
    "日本語 émoji 🎉 don't",
    "   leading, trailing   ",
    "a1b22c333 ½ ²",
    "<|im_start|>user\nhi<|im_end|>",
]


def test_texts_come_back():
    _, tokenizer = smollm2()
    for text in TEXTS[:-1]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama_cpp_cuts_alike():
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    _, tokenizer = smollm2()
    vocabulary = package.Llama(str(smollm2_path()), vocab_only=True, verbose=False)
    for text in TEXTS:
        expected = vocabulary.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(text) == expected, text


def test_a_chat_ends_where_the_answer_begins():
    _, tokenizer = smollm2()
    chat = tokenizer.chat("Hi")
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == chat
    assert tokenizer.end_token == tokenizer.encode("<|im_end|>")[0]


def test_a_stream_holds_back_half_a_character():
    _, tokenizer = smollm2()
    text = "🎉 日本 end"
    tokens = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokens]
    assert "" in pieces and "".join(pieces) == text and stream.finish() == ""
    assert stream.add(tokens[0]) == "" and stream.finish() == "\ufffd"


@pytest.fixture
def small():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    return lambda **given: Tokenizer(byte_tokenizer(**given))


def test_any_tokens_are_decoded_as_the_library_decodes_them():
    _, tokenizer = smollm2()
    random = np.random.default_rng(0)
    short = [token for token in range(tokenizer.vocab_size) if len(tokenizer.bytes_of(token)) < 2]
    for _ in range(100):
        tokens = [*random.integers(tokenizer.vocab_size, size=20), *random.choice(short, 20)]
        random.shuffle(tokens)
        tokens = [int(token) for token in tokens]
        text = tokenizer.decode(tokens)
        assert text == tokenizer._encoder.decode(tokens)
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.add, tokens), stream.finish()]) == text


def test_a_run_of_invalid_bytes_streams_in_time_that_grows_with_its_length(small):
    stream, tokens = TextStream(small()), [0xFF, 0x80, 0xE2, 0x82] * 25_000
    start = time.perf_counter()
    pieces = [stream.add(token) for token in tokens]
    pieces.append(stream.finish())
    assert time.perf_counter() - start < 5  # 0.1 s; looking at all of the run each time takes an hour
    assert "".join(pieces) == small().decode(tokens) == "\ufffd" * 75_000
    assert max(map(len, pieces)) <= 2  # nothing is held back that is decided


def test_every_byte_is_a_token(small):
    tokenizer = small()
    assert [tokenizer.bytes_of(token) for token in range(256)] == [bytes([byte]) for byte in range(256)]
    for text in ("a é 日本 🎉\n\x00", " a", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(ValueError, match="token must be a token id from 0 to 260; got 261"):
        tokenizer.decode([261])
    with pytest.raises(ValueError, match="token must be a token id from 0 to 260; got -1"):
        TextStream(tokenizer).add(-1)


def test_tokens_of_a_user_are_text_and_control_tokens_are_not(small):
    tokenizer = small()
    tokens = tokenizer.encode("<s>b<u><é> a</s>")
    assert tokens == [257, ord("b"), 259, 260, 256, 258]
    assert tokenizer.decode(tokens) == "b<u><é> a"
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in tokens] == ["", "b", "<u>", "<é>", " a", ""]


def test_a_text_begins_as_the_file_says_once(small):
    for asked in (None, False):
        plain = small(add_bos_token=asked)
        assert plain.begin_token is None and plain.encode("b") == [98] and plain.encode("") == []
    begun = small(add_bos_token=True)
    assert begun.begin_token == 257
    assert begun.encode("b") == begun.encode("<s>b") == [257, 98] and begun.encode("") == [257]
    with pytest.raises(
        ValueError, match="tokenizer.ggml.bos_token_id must be a token id below 261; the file says None"
    ):
        small(add_bos_token=True, bos_token_id=None)


def test_a_template_may_name_special_tokens(small):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = small(template=template, add_bos_token=True)
    assert tokenizer.chat("b") == "<s>b</s>"
    assert tokenizer.encode(tokenizer.chat("b")) == [257, 98, 258]  # begins once
    assert small(template="{{ pad_token is defined }}{{ bos_token is defined }}").chat("b") == "FalseTrue"
    assert small(template="{% for m in messages %}{% break %}{% endfor %}!").chat("b") == "!"
    for name in ("pad_token", "unk_token"):
        with pytest.raises(ValueError, match=f"chat_template cannot write these messages: '{name}' is undefined"):
            small(template=f"{{{{ {name} }}}}").chat("b")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "tokenizer.chat_template cannot be read: "),
        ("{{ raise_exception('roles must alternate') }}", "cannot write these messages: roles must alternate"),
        ("{{ messages[3].content.upper() }}", "tokenizer.chat_template cannot write these messages: "),
        ("{{ messages[0].content + 1 }}", "tokenizer.chat_template cannot write these messages: "),
        ("{{ 1 / 0 }}", "tokenizer.chat_template cannot write these messages: division by zero"),
        (None, "chat needs a tokenizer.chat_template; the file has none"),
        ("", "chat needs a tokenizer.chat_template; the file has none"),
    ],
)
def test_a_template_that_fails_is_named(small, template, message):
    tokenizer = small(template=template)
    assert tokenizer.encode("b") == [98]  # texts can still be continued
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            tokenizer.chat("b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"add_eos_token": True}, "tokenizer.ggml.add_eos_token must be left out or false; it is not served"),
        ({"add_sep_token": True}, "tokenizer.ggml.add_sep_token must be left out or false"),
        ({"add_space_prefix": True}, "tokenizer.ggml.add_space_prefix must be left out or false"),
        ({"remove_extra_whitespaces": True}, "tokenizer.ggml.remove_extra_whitespaces must be left out or false"),
        ({"precompiled_charsmap": [1]}, "tokenizer.ggml.precompiled_charsmap must be left out or false"),
        ({"eot_token_id": 257}, "tokenizer.ggml.eot_token_id must be eos_token_id, 258: .*; the file says 257"),
        ({"eom_token_id": 257}, "tokenizer.ggml.eom_token_id must be eos_token_id, 258: .*; the file says 257"),
    ],
)
def test_what_would_not_be_heeded_is_refused(small, given, message):
    with pytest.raises(pg.UnsupportedError, match=message):
        small(**given)


def test_what_is_off_may_be_said(small):
    assert small(add_eos_token=False, add_space_prefix=False, eot_token_id=258).encode("b") == [98]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": None}, "tokenizer.ggml.tokens must be a list of str; the file has no such list"),
        ({"merges": None}, "tokenizer.ggml.merges must be a list of str; the file has no such list"),
        ({"token_type": None}, "tokenizer.ggml.token_type must be a list of int; the file has no such list"),
        ({"token_type": [1]}, "261 names, 261 of them different, and 1 types"),
        ({"tokens": ["a"] * 261}, "261 names, 1 of them different, and 261 types"),
        ({"merges": ["Ġa"]}, "tokenizer.ggml.merges must be pairs of tokens"),
        ({"merges": ["Ġ b"]}, "tokenizer.ggml.merges must be pairs of tokens"),
        ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id must be a token id below 261; the file says None"),
        ({"eos_token_id": 261}, "tokenizer.ggml.eos_token_id must be a token id below 261; the file says 261"),
        ({"bos_token_id": 261}, "tokenizer.ggml.bos_token_id must be a token id below 261; the file says 261"),
    ],
)
def test_what_a_tokenizer_lacks_is_named(small, given, message):
    with pytest.raises(ValueError, match=message):
        small(**given)


def test_a_text_that_is_no_unicode_is_named(small):
    with pytest.raises(ValueError, match="text must be Unicode without lone surrogates"):
        small().encode("a\udc80")


def test_another_kind_of_tokenizer_is_refused():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    with pytest.raises(pg.UnsupportedError, match="the file says 'llama', cut None"):
        Tokenizer({"tokenizer.ggml.model": "llama"})

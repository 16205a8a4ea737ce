"""The tokenizer cuts as llama.cpp does, and text comes back whole."""

import pytest

import cupaged as pg
from cupaged.engine.tokenizer import TextStream, Tokenizer
from cupaged.engine.weights import smollm2_path
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


def test_another_kind_of_tokenizer_is_refused():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    with pytest.raises(pg.UnsupportedError, match="the file says 'llama', cut None"):
        Tokenizer({"tokenizer.ggml.model": "llama"})

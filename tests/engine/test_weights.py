"""What is read from a file is what was written to it, and llama.cpp reads it alike."""

from dataclasses import fields, replace

import numpy as np
import pytest

import cupaged as pg
from cupaged.engine.weights import LayerWeights, in_halves, interleaved, random_checkpoint, read_gguf
from tests.kit.experiments import functions
from tests.kit.llama import SMALL, logits_budget, write_gguf
from tests.kit.real_model import smollm2

TOKENS = np.random.default_rng(0).integers(SMALL.vocab_size, size=40)


def llama_cpp(path, num_tokens):
    """Return llama.cpp with float32 keys and values, or skip."""
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    f32 = package.GGML_TYPE_F32
    return package.Llama(
        str(path), n_ctx=num_tokens, logits_all=True, verbose=False, type_k=f32, type_v=f32, n_threads=2
    )


def assert_llama_cpp_agrees(path, checkpoint, tokens):
    model = llama_cpp(path, len(tokens) + 8)
    model.eval([int(token) for token in tokens])
    expected, budget = logits_budget(checkpoint, tokens)
    assert np.abs(np.array(model.scores[: len(tokens)]) - expected).max() <= budget


def test_what_is_written_is_read(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    written = random_checkpoint(SMALL)
    read = read_gguf(write_gguf(tmp_path / "small.gguf", written))
    assert replace(read.config, norm_eps=SMALL.norm_eps) == SMALL  # which a GGUF file holds in float32
    assert read.config.norm_eps == np.float32(SMALL.norm_eps)
    for layer, expected in zip(read.layers, written.layers, strict=True):
        for field in fields(LayerWeights):
            np.testing.assert_array_equal(getattr(layer, field.name), getattr(expected, field.name), field.name)
    np.testing.assert_array_equal(read.embedding, written.embedding)
    assert read.unembedding is read.embedding


def test_an_unembedding_of_its_own_is_read(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    written = random_checkpoint(SMALL)
    written = replace(written, unembedding=written.embedding[::-1].copy())
    read = read_gguf(write_gguf(tmp_path / "untied.gguf", written))
    np.testing.assert_array_equal(read.unembedding, written.unembedding)


def test_rows_of_heads_are_interleaved_pair_by_pair():
    weight = np.arange(2 * 6 * 3, dtype=np.float32).reshape(12, 3)  # two heads of six
    stored = interleaved(weight, 2)
    np.testing.assert_array_equal(stored[:6], weight[[0, 3, 1, 4, 2, 5]])
    np.testing.assert_array_equal(stored[6:], weight[[6, 9, 7, 10, 8, 11]])
    np.testing.assert_array_equal(in_halves(stored, 2), weight)


def test_llama_cpp_finds_the_logits_of_the_dense_model(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    checkpoint = random_checkpoint(SMALL)
    assert_llama_cpp_agrees(write_gguf(tmp_path / "small.gguf", checkpoint), checkpoint, TOKENS)


@pytest.mark.slow
def test_llama_cpp_finds_the_logits_of_smollm2(tmp_path):
    checkpoint, tokenizer = smollm2()
    tokens = tokenizer.encode(tokenizer.chat("Why is the sky blue?") + "The sky appears blue because of")
    assert_llama_cpp_agrees(write_gguf(tmp_path / "smollm2.gguf", checkpoint), checkpoint, tokens)


@pytest.mark.gpu
@pytest.mark.slow
def test_transformers_finds_the_logits_of_smollm2():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    checkpoint, tokenizer = smollm2()
    tokens = tokenizer.encode(tokenizer.chat("Why is the sky blue?"))
    model = functions("model_step")["as_transformers"](checkpoint, "float32", "cpu")
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    expected, budget = logits_budget(checkpoint, tokens)
    assert np.abs(logits - expected).max() <= budget


def test_what_cannot_be_read_is_named(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(FileNotFoundError, match=r"there is none at .*nowhere\.gguf"):
        read_gguf(tmp_path / "nowhere.gguf")
    scaled = write_gguf(tmp_path / "scaled.gguf", random_checkpoint(SMALL), [("llama.rope.scaling.type", "yarn")])
    with pytest.raises(pg.UnsupportedError, match="scales them \\('yarn'\\)"):
        read_gguf(scaled)

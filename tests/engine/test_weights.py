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


def read_with(tmp_path, metadata=(), tensors=(), **options):
    return read_gguf(write_gguf(tmp_path / "given.gguf", random_checkpoint(SMALL), metadata, tensors, **options))


CHANGING = {
    "rope.scaling.type": ["yarn", "longrope"],
    "rope.scaling.factor": [4.0, 0.5],
    "rope.scale_linear": [4.0, 0.25],
    "rope.scaling.attn_factor": [1.5],
    "rope.scaling.alpha": [2.0],
    "rope.scaling.finetuned": [True],
    "rope.scaling.original_context_length": [64],
    "rope.scaling.yarn_log_multiplier": [0.1],
    "rope.scaling.yarn_ext_factor": [1.0],
    "rope.scaling.yarn_attn_factor": [1.0],
    "rope.scaling.yarn_beta_fast": [32.0],
    "rope.scaling.yarn_beta_slow": [1.0],
    "rope.dimension_count": [16],
    "rope.dimension_count_swa": [16],
    "rope.dimension_sections": [[8, 8, 8, 8]],
    "rope.freq_base_swa": [10000.0],
    "attention.sliding_window": [16, 511, [16, 16]],
    "attention.sliding_window_pattern": [2],
    "attention.value_length": [16],
    "attention.value_length_mla": [16],
    "attention.layer_norm_epsilon": [0.5],
    "attention.group_norm_epsilon": [0.5],
    "attention.causal": [False],
    "attention.scale": [0.5],
    "attention.output_scale": [0.5],
    "attention.temperature_scale": [0.1],
    "attention.temperature_length": [8],
    "attention.clamp_kqv": [8.0],
    "attention.max_alibi_bias": [8.0],
    "attention.head_count_kv": [[2, 1]],
    "attention.shared_kv_layers": [1],
    "attn_logit_softcapping": [50.0],
    "final_logit_softcapping": [30.0],
    "router_logit_softcapping": [30.0],
    "logit_scale": [0.5],
    "residual_scale": [0.5],
    "embedding_scale": [12.0],
    "expert_count": [8],
    "expert_used_count": [2],
    "expert_shared_count": [1],
    "leading_dense_block_count": [1],
    "interleave_moe_layer_step": [1],
    "feed_forward_length": [[96, 48]],
    "use_parallel_residual": [True],
    "pooling_type": [1],
    "swin_norm": [True],
    "swiglu_clamp_exp": [7.0],
    "tensor_data_layout": ["reference"],
    "a_key_of_tomorrow": [1],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHANGING.items() for value in values])
def test_a_key_that_would_change_what_weights_mean_is_refused_by_name(tmp_path, name, value):
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(pg.UnsupportedError, match=f"llama\\.{name.replace('.', chr(92) + '.')}") as refused:
        read_with(tmp_path, [(f"llama.{name}", value)])
    if not isinstance(value, list):
        assert str(value)[:3] in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value"), [("general.type", "adapter"), ("split.count", 3), ("general.architecture", "mistral")]
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, key, value):
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(pg.UnsupportedError, match=f"the file says '?{value}'?"):
        read_with(tmp_path, [(key, value)])


def test_keys_that_say_what_a_plain_llama_is_are_taken(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    plain = [
        ("rope.scaling.type", "none"), ("rope.scaling.factor", 1.0), ("rope.scale_linear", 1.0),
        ("rope.scaling.attn_factor", 1.0), ("rope.scaling.original_context_length", 512),
        ("rope.scaling.finetuned", False), ("attention.causal", True), ("attention.clamp_kqv", 0.0),
        ("attention.max_alibi_bias", 0.0), ("attention.sliding_window", 512), ("logit_scale", 1.0), ("expert_count", 0),
        ("expert_used_count", 0), ("use_parallel_residual", False), ("tensor_data_layout", "Meta AI original pth"),
    ]  # fmt: skip
    read = read_with(tmp_path, [(f"llama.{name}", value) for name, value in plain])
    assert replace(read.config, norm_eps=SMALL.norm_eps) == SMALL


def test_what_a_file_leaves_out_is_what_llama_cpp_takes(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    config = replace(SMALL, num_heads=2, num_kv_heads=2, rope_base=10_000.0)  # 64 features in heads of 32
    left_out = [
        (f"llama.{name}", None)
        for name in ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base",
                     "rope.dimension_count", "vocab_size")
    ]  # fmt: skip
    read = read_gguf(write_gguf(tmp_path / "short.gguf", random_checkpoint(config), left_out))
    assert replace(read.config, norm_eps=SMALL.norm_eps) == config


@pytest.mark.parametrize(
    "key", ["attn_q.bias", "attn_k.bias", "attn_output.bias", "ffn_gate_inp.weight", "attn_q_norm.weight"]
)
def test_a_tensor_that_is_not_read_is_refused_by_name(tmp_path, key):
    pytest.importorskip("gguf", reason="gguf is not installed")
    for name in (f"blk.1.{key}", "rope_freqs.weight", "blk.2.attn_q.weight"):
        with pytest.raises(pg.UnsupportedError, match=f"tensors that a plain Llama does not have: {name}"):
            read_with(tmp_path, tensors=[(name, np.ones(64, np.float32))])


def test_a_big_endian_file_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(
        pg.UnsupportedError, match="model must be a little-endian GGUF file; .*given.gguf is big-endian"
    ):
        read_with(tmp_path, big_endian=True)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        *(
            ([(f"llama.{name}", None)], (), f"model must say llama.{name}; the file does not")
            for name in ("context_length", "embedding_length", "block_count", "feed_forward_length",
                         "attention.head_count", "attention.layer_norm_rms_epsilon")
        ),
        ([("llama.block_count", "2")], (), "llama.block_count must be a whole number of at least 1; the file says '2'"),
        ([("llama.block_count", 0)], (), "llama.block_count must be a whole number of at least 1; the file says 0"),
        ([("llama.rope.freq_base", 0.0)], (), "llama.rope.freq_base must be a number above 0; the file says 0.0"),
        ([("llama.vocab_size", 98)], (), "llama.vocab_size must be 97, .*; the file says 98"),
        ([("tokenizer.ggml.tokens", ["a"])], (), "the number of tokenizer.ggml.tokens must be 97, .* the file says 1"),
        ([("llama.attention.head_count_kv", 3)], (), "must be a multiple of llama.attention.head_count_kv, 3"),
        ([], [("token_embd.weight", None)], "model must have the tensor token_embd.weight; the file has none"),
        ([], [("blk.1.ffn_up.weight", None)], "model must have the tensor blk.1.ffn_up.weight; the file has none"),
        ([("llama.block_count", 3)], [], "model must have the tensor blk.2.attn_norm.weight; the file has none"),
        ([], [("output_norm.weight", np.ones(63, np.float32))],
         r"the tensor output_norm.weight must have shape \[64\]; the file says \[63\]"),
        ([], [("blk.0.ffn_up.weight", np.ones((64, 96), np.float32))],
         r"blk.0.ffn_up.weight must have shape \[96, 64\]; the file says \[64, 96\]"),
        ([], [("output_norm.weight", np.ones(64, np.int32))], "the tensor output_norm.weight must be of a type that"),
    ],
)  # fmt: skip
def test_what_a_file_lacks_or_has_wrong_is_named(tmp_path, metadata, tensors, message):
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(ValueError, match=message):
        read_with(tmp_path, metadata, tensors)


def test_a_file_that_is_cut_short_anywhere_is_named(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    whole = write_gguf(tmp_path / "whole.gguf", random_checkpoint(SMALL)).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 8, 20, 24, 30, 100, 500, 1000, 2000, 3000, len(whole) // 2, len(whole) - 40):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model must be a whole GGUF file; .*cut.gguf cannot be read"):
            read_gguf(cut)
    cut.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match="cannot be read: GGUF magic invalid"):
        read_gguf(cut)

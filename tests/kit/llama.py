"""A Llama without paging, without batching and without a cache; and small ones to try it on."""

from dataclasses import fields, replace

import numpy as np

from cupaged.engine.tokenizer import BYTE_OF_CHARACTER
from cupaged.engine.weights import TENSORS, ModelConfig, interleaved

SMALL = ModelConfig(
    num_layers=2, hidden_size=64, intermediate_size=96, vocab_size=97, num_heads=4, num_kv_heads=2, head_dim=32,
    rope_base=1000.0, max_tokens=512,
)  # fmt: skip


def dense_logits(checkpoint, tokens, xp=np, dtype=np.float32):
    """Return the logits after every token, [tokens, vocab_size]: the whole text is computed at once.

    Written from the paper and on its own: heads one by one, and RoPE as a product of complex numbers.
    """
    config = checkpoint.config

    def array(weight):
        return xp.asarray(weight).astype(dtype)

    def norm(x, weight):
        return x * (1 / xp.sqrt(xp.square(x).mean(-1, keepdims=True) + dtype(config.norm_eps))) * array(weight)

    def turn(x):  # [tokens, D]
        half = config.head_dim // 2
        angle = np.arange(len(tokens))[:, None] / config.rope_base ** (np.arange(half) / half)
        turned = (x[:, :half] + 1j * x[:, half:]) * xp.asarray(np.exp(1j * angle))
        return xp.concatenate([turned.real, turned.imag], axis=1).astype(dtype)

    x = array(checkpoint.embedding[np.asarray(tokens)])
    future = xp.asarray(np.triu(np.ones((len(tokens), len(tokens)), bool), 1))
    for layer in checkpoint.layers:
        h = norm(x, layer.attention_norm)
        outs = []
        for head in range(config.num_heads):
            d, kv = config.head_dim, head * config.num_kv_heads // config.num_heads
            query = turn(h @ array(layer.query[head * d : head * d + d]).T)
            key = turn(h @ array(layer.key[kv * d : kv * d + d]).T)
            value = h @ array(layer.value[kv * d : kv * d + d]).T
            logits = xp.where(future, -np.inf, query @ key.T / np.sqrt(d)).astype(dtype)
            weights = xp.exp(logits - logits.max(-1, keepdims=True))
            outs.append(weights / weights.sum(-1, keepdims=True) @ value)
        x = x + xp.concatenate(outs, axis=1) @ array(layer.output).T
        h = norm(x, layer.mlp_norm)
        gate = h @ array(layer.gate).T
        x = x + (gate / (1 + xp.exp(-gate)) * (h @ array(layer.up).T)) @ array(layer.down).T
    return norm(x, checkpoint.final_norm) @ array(checkpoint.unembedding).T


def dense_greedy(checkpoint, prompt, num_tokens, xp=np):
    """Return the tokens that greedy choice adds to a prompt, each after a look at all of the text again."""
    tokens = [int(token) for token in prompt]
    for _ in range(num_tokens):
        tokens.append(int(dense_logits(checkpoint, tokens, xp)[-1].argmax()))
    return tokens[len(prompt) :]


def logits_budget(checkpoint, tokens):
    """Return the logits in float64, and how far from them float32 may be: a few times what it loses here."""
    exact = dense_logits(checkpoint, tokens, dtype=np.float64)
    single = dense_logits(checkpoint, tokens)
    return exact, 4 * np.abs(single - exact).max() + 4 * np.finfo(np.float32).eps * np.abs(exact).max()


def half_budget(checkpoint, text, storage):
    """Return how far logits may move: what rounding all weights, once, to the type moves them, a few times over."""

    def rounded(weight):
        return weight.astype(storage).astype(np.float32)

    layers = tuple(
        type(layer)(**{field.name: rounded(getattr(layer, field.name)) for field in fields(layer)})
        for layer in checkpoint.layers
    )
    embedding = rounded(checkpoint.embedding)
    other = replace(checkpoint, layers=layers, embedding=embedding, unembedding=embedding)
    moved = dense_logits(other, text, dtype=np.float64) - dense_logits(checkpoint, text, dtype=np.float64)
    return 4 * np.abs(moved).max()


def byte_tokenizer(**given):
    """Return the metadata of a tokenizer of single bytes, with two control tokens, 257 and 258, and two of a user.

    What is given takes the place of it; None leaves it out. A chat template is given as `template`.
    """
    alphabet = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.get)
    entries = {
        "model": "gpt2", "pre": "smollm", "tokens": [*alphabet, "Ġa", "<s>", "</s>", "<u>", "<é>"], "merges": ["Ġ a"],
        "token_type": [1] * 257 + [3, 3, 4, 4], "bos_token_id": 257, "eos_token_id": 258, **given,
    }  # fmt: skip
    metadata = {f"tokenizer.ggml.{name}": value for name, value in entries.items() if value is not None}
    template = metadata.pop("tokenizer.ggml.template", None)
    return metadata if template is None else {**metadata, "tokenizer.chat_template": template}


def write_gguf(path, checkpoint, metadata=(), tensors=(), big_endian=False):
    """Write a model to a GGUF file in float32, as llama.cpp reads it: query and key rows interleaved.

    Pairs of `metadata` and `tensors` take the place of what the model has; None leaves it out.
    """
    from gguf import GGUFEndian, GGUFWriter

    config = checkpoint.config
    writer = GGUFWriter(path, "llama", endianess=GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for name, value in metadata:
        writer.kv_data[0].pop(name, None)
        if value is not None:
            adders.get(type(value), writer.add_array)(name, value)
    arrays = {"token_embd.weight": checkpoint.embedding, "output_norm.weight": checkpoint.final_norm}
    if checkpoint.unembedding is not checkpoint.embedding:
        arrays["output.weight"] = checkpoint.unembedding
    for i, layer in enumerate(checkpoint.layers):
        for name, in_file in TENSORS.items():
            weight = getattr(layer, name)
            heads = {"query": config.num_heads, "key": config.num_kv_heads}.get(name)
            arrays[f"blk.{i}.{in_file}.weight"] = interleaved(weight, heads) if heads else weight
    for name, array in {**arrays, **dict(tensors)}.items():
        if array is not None:
            writer.add_tensor(name, array.copy())  # which the writer turns round for a big-endian file
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""paged_attention_texture: keys and values through textures, or by another path of loads."""

from __future__ import annotations

from typing import Any

from cupaged.attention.call import AttentionCall
from cupaged.attention.kernel import Kernel, Launch, Serves, cache_arguments, load, row_defines
from cupaged.ops.textures import load_path
from cupaged.runtime.info import KernelInfo

__all__ = ["TEXTURE"]

THREADS = 128


class Texture(Kernel):
    """Loads by ``tex1Dfetch``, or as ``kernels_defining(LOAD_PATH=...)`` has it."""

    info = KernelInfo(
        "paged_attention_texture",
        "attention/paged_attention_texture.cu",
        "paged_attention_online with keys and values through textures, or by another path of loads that a define names",
        Serves(whole_rows=True),
    )

    def prepare(self, call: AttentionCall, plan: Any) -> list[Launch]:
        """Return the one launch; textures are bound to the cache by the first call."""
        call = call.on_three_axes
        of_path, textures = load_path(call.cache)
        kernel = load(self.info, {**row_defines(call.config), **of_path}, call.cache.backend)
        arguments = {**cache_arguments(call, packs=False), "num_heads": call.num_heads, **textures}
        return [Launch(kernel, (call.query.shape[0] * call.num_heads,), (THREADS,), arguments)]


TEXTURE = Texture()

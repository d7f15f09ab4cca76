"""Splash attention: the Pallas kernel that jax brings for TPUs, on one device's rows and heads."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.mask import Mask
from sharding.platform import platform

BLOCKS = (512, 256, 128)  # rows of a tile: the largest that divides the length


def refusal(q: Any, k: Any, mask: Mask, sinks: Any) -> str | None:
    """Why splash attention cannot serve this, or None."""
    if q.shape[1] != k.shape[1] or q.shape[1] % BLOCKS[-1]:
        return f"wants rows that attend to themselves, of a multiple of {BLOCKS[-1]} tokens, not {q.shape[1]}"
    if not mask.causal or mask.kv_branches is not None:
        return "has causal attention only, without branches"
    if mask.window is not None and not mask.windows:
        return "wants windows that are known when it is compiled"
    return "has no sinks" if sinks is not None else None


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    mask: Mask,
    softcap: float | None = None,
) -> Float[Array, "B T N V"]:
    """attend's of rows in order: "not later" is by place, which in a segment is the same as by position.

    On other platforms the kernel is interpreted, for tests.
    """
    windows = mask.windows or (None,)
    ways = [partial(_rows, window=window, softcap=softcap) for window in windows]
    if len(ways) == 1:
        return ways[0](q, k, v, mask.q_segments)
    which = (jnp.asarray(windows) == mask.window).argmax()
    return jax.lax.switch(which, ways, q, k, v, mask.q_segments)


def _rows(q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N = q.shape[1:3]
    size = next(size for size in BLOCKS if T % size == 0)
    if window is None or window >= T:
        one: Any = masks.CausalMask((T, T))
    else:
        one = masks.LocalMask((T, T), (window - 1, 0), 0)
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([one] * N),
        block_sizes=kernels.BlockSizes(size, size, size, size, size, size, size, size),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=platform() != "tpu",
    )
    heads_first = lambda x: x.swapaxes(1, 2)  # noqa: E731
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    run = lambda q, k, v, s: kernel(q, k, v, segment_ids=kernels.SegmentIds(s, s))  # noqa: E731
    return heads_first(jax.vmap(run)(heads_first(scaled), heads_first(k), heads_first(v), segments))

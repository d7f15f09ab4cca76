"""Analytic FLOPs (a compiler's count misses the trip count of a scan) and what a device can do at best."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from model.architecture import Architecture
from model.transformer import declare

# Dense peak in FLOP/s from the vendors' data sheets: {fragment of device_kind: (bf16, f32 or TF32)}.
PEAKS = {
    "H200": (989e12, 494e12),
    "H100": (989e12, 494e12),
    "B200": (2250e12, 1125e12),
    "A100": (312e12, 156e12),
    "TPU v4": (275e12, 275e12),
    "TPU v5 lite": (197e12, 197e12),
    "TPU v5p": (459e12, 459e12),
    "TPU v5": (459e12, 459e12),
    "TPU v6": (918e12, 918e12),
    "TPU7x": (1153.5e12, 1153.5e12),  # half a chip: two of its devices are one
}


def matmul_params(arch: Architecture) -> int:
    """Parameters that every token is multiplied with: the layers' weights (of experts, as many as a token takes) and
    the head, not the embedding lookup."""
    total = (arch.num_labels or arch.vocab_size) * arch.d_model
    for path, d in declare(arch).items():
        if path.startswith(tuple(f"{group}/" for group in arch.groups)) and path.endswith("/weight"):
            share = arch.experts.top_k / arch.experts.count if arch.experts and "expert" in d.axes else 1
            total += round(math.prod(d.shape) * share)
    return total


def train_flops(arch: Architecture, tokens: float, context: float, frozen: bool) -> float:
    """Model FLOPs of a training step: 6 per matmul parameter and token (4 if the base is frozen), and causal attention.

    tokens: not padding; context: keys seen, summed over the tokens. No recomputation is counted.
    With L layers, N heads of size H this is the convention 6 P + 6 L N H s_eff, s_eff = sum(length^2) / sum(length).
    A layer with a window counts at most the window for a token on average: the sum alone says no more.
    """
    windows = arch.windows or (0,) * arch.num_layers
    keys = sum(min(context, window * tokens) if window else context for window in windows)
    attention = 12.0 * arch.num_heads * arch.head_dim * keys
    return (4.0 if frozen else 6.0) * matmul_params(arch) * tokens + attention


def peak_flops(dtype: Any) -> float:
    """FLOP/s of one device: the data sheet's for accelerators, the best of a few measured matrix products for a CPU."""
    device = jax.devices()[0]
    for fragment, (half, single) in PEAKS.items():
        if fragment.lower() in device.device_kind.lower():
            return half if jnp.dtype(dtype).itemsize <= 2 else single
    if device.platform != "cpu":
        return math.nan
    n = 1024
    x = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / len(jax.devices())

"""MXFP4 weights, read only: 4-bit floats (E2M1), 32 of which share a power of two (OCP Microscaling Formats 1.0)."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from configs.errors import UsageError
from convert.tensors import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of exponent and mantissa; the fourth bit is the sign
VALUES = np.array((*_HALF, *(-x for x in _HALF)), np.float32)
BIAS = 127  # of the shared exponent


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every pair of blocks and scales as the bfloat16 weight [.., inputs, outputs] that it stands for.

    blocks u8[.., outputs, groups, 16], two numbers a byte, the lower bits first; scales u8[.., outputs, groups].
    """
    made = {name: tensor for name, tensor in tensors.items() if not name.endswith((BLOCKS, SCALES))}
    for name, blocks in tensors.items():
        if not name.endswith(BLOCKS):
            continue
        stem = name.removesuffix(BLOCKS)
        scales = tensors.get(stem + SCALES)
        if scales is None or blocks.stored != "U8" or scales.shape != blocks.shape[:-1]:
            raise UsageError(f"{blocks.where}: {name} {blocks.stored} {list(blocks.shape)} lacks its {stem}{SCALES}")
        made[stem] = _weight(blocks, scales)
    return made


def _weight(blocks: Tensor, scales: Tensor) -> Tensor:
    *lead, outputs, groups, half = blocks.shape

    def read() -> np.ndarray:
        packed = blocks.read().reshape(blocks.shape)
        numbers = np.stack([VALUES[packed & 15], VALUES[packed >> 4]], axis=-1).reshape(*lead, outputs, groups, -1)
        shared = scales.read().reshape(scales.shape).astype(np.int32) - BIAS
        whole = np.ldexp(numbers, shared[..., None]).astype(ml_dtypes.bfloat16)
        return whole.reshape(*lead, outputs, -1).swapaxes(-1, -2)

    shape = (*lead, groups * half * 2, outputs)
    return Tensor(shape, np.dtype(ml_dtypes.bfloat16), blocks.where, read, False, "MXFP4")

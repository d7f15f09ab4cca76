"""The safetensors format against the safetensors library, and files that are broken."""

import json
import struct

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from configs.errors import UsageError
from convert.tensors import Outgoing, open_safetensors, write_safetensors


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((4,)).astype(bfloat16),
        "c": rng.standard_normal((2, 1, 3)).astype(np.float16),
        "d": rng.standard_normal((2,)),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3, np.float32),
    }


def same(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def test_read_what_the_library_wrote(tmp_path):
    save_file(arrays(), tmp_path / "x.safetensors")
    found = open_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == arrays().keys()
    assert all(same(found[name].read(), value) for name, value in arrays().items())


def test_the_library_reads_what_we_wrote(tmp_path):
    path, done = tmp_path / "x.safetensors", []
    out = [Outgoing(name, value.shape, value.dtype, lambda value=value: value) for name, value in arrays().items()]
    write_safetensors(path, out, advance=done.append)
    found = load_file(path)
    assert found.keys() == arrays().keys()
    assert all(same(found[name], value) for name, value in arrays().items())
    assert sum(done) == sum(value.nbytes for value in arrays().values())


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1, -20])
def test_truncated(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file(arrays(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="truncated"):
        open_safetensors(path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"not json", b""),
        (b"[1, 2]", b""),
        (b'{"a": 3}', b""),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"0000"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', b"0000"),
        (b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"0000"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"0000trailing"),
    ],
)
def test_corrupt(tmp_path, header, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    with pytest.raises(UsageError, match=r"x\.safetensors"):
        open_safetensors(path)


def test_header_is_padded_so_that_data_is_aligned(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [Outgoing("a", (2,), np.dtype(np.float32), lambda: np.ones(2, np.float32))])
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}

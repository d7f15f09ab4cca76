"""mesh: auto by numbers alone: what it chooses for known models and hardware, and what holds of every choice."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UsageError
from sharding.auto_mesh import GIB, USED, Hardware, Workload, _shapes, auto_mesh, memory_of, obstacles
from sharding.mesh import AXES

V5P = Hardware(64, 92 * GIB, 459e12, 1.8e11, 6e9)
H100 = Hardware(16, 73 * GIB, 989e12, 4.5e11, 5e10, 8)


def llama(layers, width, heads, kv, d_ff, vocab=128256, rows=512, length=8192, **more) -> Workload:
    """A dense model with what `remat: full` keeps."""
    size = layers * width * (width * 2 + 2 * kv * width // heads + 3 * d_ff)
    work = Workload(layers, width, heads, kv, width // heads, d_ff, vocab, rows, length, size, 2 * vocab * width)
    return replace(work, work=2 * (5 + 2 * d_ff / width), passes=4.0, logits=12 * 1024 * vocab, **more)


SMALL = llama(30, 576, 9, 3, 1536, 49152, 64, 2048)
B8 = llama(32, 4096, 32, 8, 14336)
B70 = llama(80, 8192, 64, 8, 28672, rows=256)
LONG = llama(32, 4096, 32, 8, 14336, rows=8, length=131072)
MOE = replace(
    llama(32, 4096, 32, 8, 14336, rows=256), parameters=32 * 3 * 8 * 4096 * 14336, experts=8, top_k=2, active=0.26
)


def split(work: Workload, hardware: Hardware, fixed=None, multiples=None) -> dict[str, int]:
    """The axes that are more than one device."""
    return {axis: n for axis, n in auto_mesh(work, hardware, fixed, multiples).shape.items() if n > 1}


def test_known_cases():
    assert split(B8, V5P) == {"fsdp": 64}
    assert split(B70, V5P) == {"fsdp": 64}
    assert split(SMALL, Hardware(1, 80e9, 1e15)) == {}
    assert set(split(SMALL, replace(V5P, count=8))) <= {"data", "fsdp"}
    long = split(LONG, V5P)
    assert long.get("context", 1) * long.get("tensor", 1) >= 8  # eight rows for 64 devices
    assert "context" in long
    assert split(replace(MOE, rows=64, length=2048), V5P) == {"fsdp": 8, "expert": 8}


def test_the_slow_network_carries_least():
    """Two hosts of GPUs, or two slices: nothing but rows over the slower network."""
    assert split(replace(B8, rows=64), H100) in ({"data": 2, "fsdp": 8}, {"fsdp": 16})
    assert split(llama(16, 2048, 32, 8, 8192, rows=64), replace(H100, far=1e10)) == {"data": 2, "fsdp": 8}
    two = split(B8, replace(V5P, count=128, slice=64), None, {"data": 2})
    assert two == {"data": 2, "fsdp": 64}


def test_what_is_given_stays_and_every_further_axis_has_its_reason():
    assert split(B8, V5P, {"tensor": 4}) == {"tensor": 4, "fsdp": 16}
    assert split(replace(SMALL, rows=8), replace(V5P, count=8), {"fsdp": 1}) == {"data": 8}
    choice = auto_mesh(LONG, V5P)
    assert "8 rows of 131072 tokens" in choice.why[0]
    for axis, size in choice.shape.items():
        if size > 1 and axis not in ("data", "fsdp"):
            assert any(line.startswith(f"{axis} {size}: ") for line in choice.why[1:])


def test_what_does_not_fit_takes_least_memory_and_says_so():
    choice = auto_mesh(B70, Hardware(4, 16 * GIB, 1e14))
    assert not choice.fits
    assert "it does not fit, but no other mesh needs less" in choice.why[0]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: auto_mesh(replace(B8, rows=3), replace(V5P, count=7)), "no mesh of 7 devices divides everything"),
        (lambda: auto_mesh(replace(B8, rows=3), replace(V5P, count=7)), "rows of a micro-batch (3)"),
        (lambda: auto_mesh(B8, V5P, {"tensor": 3}), "mesh: auto with tensor=3: no mesh of 64 devices has these axes"),
    ],
)  # fmt: skip
def test_where_nothing_divides(act, message):
    with pytest.raises(UsageError) as raised:
        act()
    assert message in str(raised.value)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 32, 64]),
    st.sampled_from([SMALL, B8, LONG, MOE, replace(B8, before=2)]),
    st.sampled_from([1, 2, 4, 6, 8, 24, 64, 256]),
    st.sampled_from([1, 4, 16, 80, 200]),
    st.sampled_from([0, 4, 8]),
)
def test_of_every_choice(count, work, rows, gib, slice_size):
    """All devices are used, everything divides, and it fits if any mesh that divides does."""
    work, hardware = replace(work, rows=rows), Hardware(count, gib * GIB, 1e14, slice=slice_size)
    able = [shape for shape in _shapes(count, {}) if not obstacles(work, shape)]
    try:
        choice = auto_mesh(work, hardware)
    except UsageError:
        assert not able
        return
    assert math.prod(choice.shape.values()) == count
    assert tuple(choice.shape) == AXES
    assert choice.shape in able
    assert choice.fits == any(memory_of(work, shape) <= USED * hardware.memory for shape in able)

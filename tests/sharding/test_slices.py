"""Meshes over slices (TPU) and hosts (GPU): what lies across the slower network. Devices are stand-ins."""

from dataclasses import dataclass

import numpy as np
import pytest

from configs.errors import UsageError
from sharding.mesh import AXES, _grid, shape_of, slices_of


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "stand-in"


def hosts(count: int, each: int = 4) -> list[Device]:
    return [Device(i, i // each) for i in range(count * each)]


def slices(count: int, each: int = 4) -> list[Device]:
    """Of hosts of two devices; CPU as a platform stands for a slice without coordinates."""
    return [Device(i, i // 2, i // each, "tpu", "cpu") for i in range(count * each)]


def grid(sizes, devices, dcn=None):
    shape = shape_of(sizes, len(devices))
    return _grid(shape, devices, dcn or {}).reshape([size for size in shape.values() if size > 1])


def test_slices():
    assert [len(some) for some in slices_of(hosts(3))] == [4, 4, 4]
    assert [{d.slice_index for d in some} for some in slices_of(slices(2)[::-1])] == [{0}, {1}]


@pytest.mark.parametrize(
    ("sizes", "dcn", "across"),
    [
        ({"data": 2, "fsdp": 4}, {"data": 2}, "data"),
        ({"data": 2, "fsdp": 4}, {"fsdp": 2}, "fsdp"),
        ({"stage": 2, "tensor": 4}, {"stage": 2}, "stage"),
        ({"fsdp": 8}, {"fsdp": 2}, "fsdp"),
    ],
)
def test_an_axis_across_hosts(sizes, dcn, across):
    """Along `across` one meets both hosts, in blocks; along the others one stays on a host."""
    found = grid(sizes, hosts(2), dcn)
    assert sorted(d.id for d in found.flat) == list(range(8))
    on = np.vectorize(lambda d: d.process_index)(found)
    named = [axis for axis in AXES if sizes.get(axis, 1) > 1]
    for number, axis in enumerate(named):
        lines = np.moveaxis(on, number, -1).reshape(-1, on.shape[number])
        for line in lines:
            assert line.tolist() == (sorted([0, 1] * (len(line) // 2)) if axis == across else [line[0]] * len(line))


def test_two_axes_across_four_hosts():
    on = np.vectorize(lambda d: d.process_index)(grid({"data": 4, "fsdp": 4}, hosts(4), {"data": 2, "fsdp": 2}))
    assert on.tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: grid({"data": 8}, hosts(2), {"data": 4}), "mesh.dcn (data: 4): 4 slices of the 2 there are"),
        (lambda: grid({"data": 8}, hosts(2), {"data": 3}), "mesh.dcn.data is 3, which does not divide mesh.data, 8"),
        (lambda: grid({"fsdp": 8}, hosts(2), {"data": 2}), "mesh.dcn.data is 2, which does not divide mesh.data, 1"),
        (lambda: grid({"data": 7}, hosts(2)[:7], {"data": 1}), "1 slice of the 2 there are (TPU slices, or hosts)"),
        (lambda: grid({"data": 6}, hosts(2)[:6], {"data": 2}), "slices of 4, 2 devices"),
    ],
)
def test_what_does_not_fit_the_slices_is_refused(act, message):
    with pytest.raises(UsageError) as raised:
        act()
    assert message in str(raised.value)


def test_slices_that_nothing_is_said_of_lie_along_the_outermost_axes(monkeypatch):
    monkeypatch.setattr("sharding.mesh._within", lambda some, shape: np.asarray(some, dtype=object).reshape(shape))
    on = lambda found: np.vectorize(lambda d: d.slice_index)(found).tolist()  # noqa: E731
    assert on(grid({"data": 2, "fsdp": 4}, slices(2))) == [[0] * 4, [1] * 4]
    assert on(grid({"fsdp": 8}, slices(2))) == [0] * 4 + [1] * 4
    assert on(grid({"data": 2, "fsdp": 2, "tensor": 2}, slices(4, 2))) == [[[0, 0], [1, 1]], [[2, 2], [3, 3]]]
    with pytest.raises(UsageError, match="the mesh's axes: 1 slice of the 3 there are"):
        grid({"tensor": 4, "data": 1}, slices(4, 1)[:3] + slices(1, 1)[:0] + [Device(3, 3, 2, "tpu")])

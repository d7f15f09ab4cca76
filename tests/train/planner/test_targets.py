"""Targets: what is read, what is refused, and how fast a group of devices talks."""

import pytest

from configs.errors import UsageError
from train.planner.plan import stand_ins
from train.planner.targets import CHIPS, gpu_config, parse_target


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [
        ("v4:2x2x4", 16, 16), ("v5e:4x4", 16, 16), ("V5P:4x4x4", 64, 64), ("v6e:16x16", 256, 256),
        ("v7x:2x2x2", 8, 16), ("h100:2x8", 16, 16), ("h200:8", 8, 8), ("b200:4x8", 32, 32), ("cpu:8", 8, 8),
    ],
)  # fmt: skip
def test_a_target_is_read(text, chips, devices):
    target = parse_target(text)
    assert (target.chips, target.size) == (chips, devices)
    assert target.memory > 0


@pytest.mark.parametrize(
    "text", ["v9:4x4", "v5e", "v5e:4x4x4", "v5p:4x4", "h100:2x9", "h100:0x8", "cpu:2x2", "v5p:99x99x99"]
)
def test_another_is_refused_with_what_is_allowed(text):
    with pytest.raises(UsageError, match=r"--target is .*(allowed|as v4:2x2x4|at most)"):
        parse_target(text)


def test_memory_is_of_a_device_not_of_a_chip():
    assert parse_target("v7x:2x2x2").memory * 2 == pytest.approx(CHIPS["v7x"].memory * 0.97)


def test_bandwidth_of_a_group():
    hosts = parse_target("h100:2x8")
    devices = stand_ins(hosts)
    assert hosts.bandwidth(devices[:8]) == 450e9  # within a host: NVLink
    assert hosts.bandwidth(devices) == 400e9  # two hosts: eight cards of 50 GB/s each
    assert hosts.bandwidth([devices[0], devices[8]]) == 50e9  # a pair has one card each
    torus = parse_target("v5p:4x4x4")
    devices = stand_ins(torus)
    assert devices[-1].coords == (3, 3, 3)
    line = [device for device in devices if device.coords[1:] == (0, 0)]
    assert torus.bandwidth(line) == 2 * 90e9  # a ring of four, both ways round
    assert torus.bandwidth(devices) == 6 * 90e9
    plane = parse_target("v5e:4x4")
    devices = stand_ins(plane)
    assert plane.bandwidth(devices) == 2 * 45e9  # no ring below 16


def test_a_gpu_is_described_with_its_capability():
    assert "cuda_compute_capability { major: 10 minor: 0 }" in gpu_config(CHIPS["b200"])

"""Memory that stays with the process."""

import subprocess
import sys

import pytest

from configs.errors import UsageError
from train import heap

TOUCH = """
import resource, sys
import numpy as np
from train.heap import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(how: str) -> int:
    """Page faults of filling 64 MiB that were filled and freed before."""
    found = subprocess.run([sys.executable, "-c", TOUCH, how], capture_output=True, text=True, check=True)
    return int(found.stdout)


def test_kept_memory_is_not_faulted_in_again():
    assert faults("keep") < 100 < faults("give back")


def test_a_c_library_without_mallopt_is_named(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    with pytest.raises(UsageError, match=r"train\.keep_memory is true, but this system's C library is not glibc"):
        heap.keep_memory()

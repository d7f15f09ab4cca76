"""A step of a recipe on CPU devices: the bytes that are planned, and those that it is seen to take.

python measure.py cpu:8 KEY=VALUE ...
"""

import ctypes
import json
import sys
import time
from pathlib import Path

from configs.load import load
from train.planner.targets import parse_target, set_environment


def held(name: str) -> int:
    """Bytes of this process, as the kernel counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main(text: str, overrides: list[str]) -> None:
    """Run the step twice: what is made once is made in the first, the second is measured."""
    target = parse_target(text)
    set_environment(target)
    import jax

    from train.planner.abstract import lower, make_abstract
    from train.planner.plan import peak_of

    planned = make_abstract(load("pretrain", overrides), target)
    step = lower(planned).compile()

    def make(tree):
        ones = lambda: jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), tree)  # noqa: E731
        return jax.jit(ones, out_shardings=jax.tree.map(lambda x: x.sharding, tree))()

    batch, frozen = make(planned.batch), planned.job.frozen
    state, _ = jax.block_until_ready(step(make(planned.state), frozen, batch))
    arguments = sum(part.data.nbytes for x in jax.tree.leaves((state, batch)) for part in x.addressable_shards)
    time.sleep(1)  # a step's memory is freed by another thread
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back to the kernel
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts anew
    jax.block_until_ready(step(state, frozen, batch))
    measured = held("VmHWM") - before + arguments
    print(json.dumps({"planned": peak_of(step.memory_analysis()) * target.size, "measured": measured}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""Checkpoints against memcpy, cp and orbax: one JSON line.   python tests/bench/checkpoint.py [MIB] [FOLDER]

blocking       seconds that save() holds up the loop, after the first one (its buffer is made then); of a memcpy
background     seconds from there until the checkpoint has its name, hashed and flushed; of `cp` and fsync of the same
               bytes (total: with the blocking part)
orbax          the same by CheckpointManager with StandardSave, its default layout, to the end
inflation      of a step of matrix products on one thread's worth of work, while a save is under way
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from configs.checkpoint import Checkpoint
from train.checkpoint import Checkpoints
from train.state import State

TIMES = 5


def make_state(mib: int) -> State:
    """Weights and two moments of 48 matrices and as many vectors."""
    rng = np.random.default_rng(0)
    wide = mib * 2**20 // 4 // 3 // 48 // 256

    def one():
        return {f"layer_{i}": {"w": rng.standard_normal((256, wide), np.float32), "b": np.ones(8)} for i in range(48)}

    return jax.tree.map(jnp.array, State(np.int32(0), one(), {"mu": one(), "nu": one()}))


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copied(files, into: Path) -> None:
    """cp, then to the disk."""
    into.mkdir()
    subprocess.run(["cp", *map(str, files), str(into)], check=True)
    for path in into.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def steps_while(step, busy, least: int = 20) -> list[float]:
    found = []
    while busy() or len(found) < least:
        found.append(seconds(step))
        if len(found) > 400:
            break
    return found


def measure(mib: int, root: Path) -> dict[str, float]:
    """All figures of one size."""
    import orbax.checkpoint as ocp

    state = jax.block_until_ready(make_state(mib))
    leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
    nbytes = sum(x.nbytes for x in leaves)
    into = [np.zeros_like(x) for x in leaves]
    ours = Checkpoints(root / "ours", Checkpoint(keep=1))
    manager = ocp.CheckpointManager(root / "orbax", options=ocp.CheckpointManagerOptions(max_to_keep=1))
    ours.save(0, state, {})
    ours.wait()
    flat = {str(i): x for i, x in enumerate(jax.tree.leaves(state))}
    manager.save(0, args=ocp.args.StandardSave(flat))
    manager.wait_until_finished()
    told: dict[str, list[float]] = {}
    note = lambda name, value: told.setdefault(name, []).append(value)  # noqa: E731
    for i in range(1, TIMES + 1):
        note("memcpy", seconds(lambda: [np.copyto(a, b) for a, b in zip(into, leaves, strict=True)]))
        began = time.perf_counter()
        note("blocking", seconds(lambda i=i: ours.save(i, state, {})))
        ours.wait()
        note("total", time.perf_counter() - began)
        assert ours.failure() is None
        files = sorted((root / "ours" / "checkpoints" / str(i)).iterdir())
        note("cp", seconds(lambda files=files, i=i: copied(files, root / f"cp{i}")))
        shutil.rmtree(root / f"cp{i}")
        began = time.perf_counter()
        note("orbax_blocking", seconds(lambda i=i: manager.save(i, args=ocp.args.StandardSave(flat))))
        manager.wait_until_finished()
        note("orbax_total", time.perf_counter() - began)
    assert ours.latest() == TIMES
    note("verify", seconds(ours.latest))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    note("restore", seconds(lambda: jax.block_until_ready(ours.restore(TIMES, like))))
    x = jnp.ones((700, 700))
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 12, lambda _, y: y @ x / 700, x))
    jax.block_until_ready(work(x))
    step = lambda: jax.block_until_ready(work(x))  # noqa: E731
    quiet = steps_while(step, lambda: False, 60)
    busy: list[float] = []
    for i in range(1, TIMES + 1):
        ours.save(TIMES + i, state, {})
        busy += steps_while(step, lambda: ours.busy, 1)[:-1]  # the last one outlived the save
    manager.close()
    m = {name: min(values) for name, values in told.items()}
    return {
        "mib": round(nbytes / 2**20, 1),
        **{name: round(value, 4) for name, value in m.items()},
        "blocking_of_memcpy": round(m["blocking"] / m["memcpy"], 2),
        "background_of_cp": round((m["total"] - m["blocking"]) / m["cp"], 2),
        "total_of_cp": round(m["total"] / m["cp"], 2),
        "faster_than_orbax": round(m["orbax_total"] / m["total"], 2),
        "step_quiet": round(statistics.median(quiet), 4),
        "steps_busy": len(busy),
        "inflation": round(statistics.median(busy) / statistics.median(quiet) - 1, 3),
    }


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        print(json.dumps({"bench": "checkpoint", **measure(size, Path(folder))}))

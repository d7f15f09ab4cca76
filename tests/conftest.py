"""Eight fake CPU devices, implicit rank promotion refused, array annotations checked at run time."""

import os
from importlib.metadata import version

# level 0: compiling is what most tests spend their time on
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # has a second code generator for fusions, which takes half as long
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub

from jaxtyping import install_import_hook  # noqa: E402

# before any of our modules is imported: every annotation becomes an assertion
install_import_hook(["model", "sharding", "decode", "train"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def mesh():
    """A mesh of one device, in context."""
    from sharding.mesh import make_mesh

    with jax.set_mesh(make_mesh({}, jax.devices()[:1])) as one:
        yield one


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """All tests of a session share compiled programs of one device, also those of its other processes."""
    here = tmp_path_factory.getbasetemp()
    names = {
        "jax_compilation_cache_dir": str((here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in names.items():
        jax.config.update(name, value)
    jax.jit(lambda: 0)()  # what turns the cache off from here on (enable_compilation_cache) comes too late
    read = compiler._cache_read
    with pytest.MonkeyPatch.context() as patch:  # of several CPUs they may hang, see sharding/compile_cache.py
        several = lambda options: options.num_partitions > 1  # noqa: E731
        patch.setattr(compiler, "_cache_read", lambda name, key, options, *more: (
            (None, None) if several(options) else read(name, key, options, *more)))  # fmt: skip
        yield
    jax.config.update("jax_compilation_cache_dir", None)

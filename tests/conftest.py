"""Eight fake CPU devices, implicit rank promotion refused, array annotations checked at run time."""

import os

# level 0: compiling is what most tests spend their time on
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub

from jaxtyping import install_import_hook  # noqa: E402

# before any of our modules is imported: every annotation becomes an assertion
install_import_hook(["model", "sharding", "decode", "train"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def mesh():
    """A mesh of one device, in context."""
    from sharding.mesh import make_mesh

    with jax.set_mesh(make_mesh({}, jax.devices()[:1])) as one:
        yield one

"""SFT against TRL, adapters and exports against peft and transformers: live, every number of every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.load import load_params, resolve
from model.compute import Compute
from model.head import head_of, logits
from model.transformer import forward
from tests.golden import sft

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def oracle():
    from tests.golden import make_sft

    return make_sft


@pytest.fixture(scope="module")
def real(oracle, tmp_path_factory):
    """SmolLM2-135M-Instruct as the folder that both sides read."""
    return oracle.export_real(tmp_path_factory.mktemp("real") / "smollm2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = sft.make_tiny(tmp_path_factory.mktemp("sft") / "tiny")
    return folder, sft.make_adapter(folder.with_name("adapter"), folder)


def check(ours, theirs, tolerance, what):
    (loss, grads), (want, expected) = ours, theirs
    far = sft.apart(grads, expected)
    worst = max(far, key=far.__getitem__)
    print(f"{what}: loss {abs(loss / want - 1):.1e} apart; worst of {len(far)} gradients {far[worst]:.1e} ({worst})")
    assert abs(loss / want - 1) < tolerance
    assert far[worst] < tolerance, worst


@pytest.mark.parametrize("window", ["uneven", "silent"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_tiny(oracle, models, window, method, dtype, tolerance):
    import torch

    folder, adapter = models
    micro = sft.windows()[window]
    with jax.enable_x64(dtype == "float64"):
        ours = sft.ours(adapter if method == "lora" else folder, micro, 24, jnp.dtype(dtype))
    theirs = oracle.theirs(folder, micro, getattr(torch, dtype), adapter if method == "lora" else None)
    check(ours, theirs, tolerance, f"tiny {window} {method} {dtype}")


@pytest.mark.parametrize("micro", [1, 2])
def test_smollm2(oracle, real, micro):
    import torch

    rows = sft.chat_rows(str(real))
    window = [rows] if micro == 1 else [[row] for row in rows]
    ours = sft.ours(real, window, 64, jnp.float32)
    check(ours, oracle.theirs(real, window, torch.float32), 1e-4, f"SmolLM2, {micro} micro-batches")


def test_smollm2_adapters(oracle, real, tmp_path):
    import torch

    rows = sft.chat_rows(str(real))
    adapter = sft.make_adapter(tmp_path / "adapter", real)
    ours = sft.ours(adapter, [rows], 64, jnp.float32)
    check(ours, oracle.theirs(real, [rows], torch.float32, adapter), 1e-4, "SmolLM2, LoRA")


def test_exports_of_a_run_have_our_logits(real, tmp_path):
    """Two steps of LoRA on the real model: the adapter in peft, the merged model in transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from configs.load import load
    from train.loop import train

    settings = [
        f"model.source={real}", "data.max_length=64", "train.epochs=null", "train.steps=2", "train.batch_size=2",
        "optim.learning_rate=1e-2", "optim.warmup_steps=0", "log.samples=null", "log.tensorboard=false",
        "train.compilation_cache=false", "mesh.fsdp=1", "mesh.data=1", f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sharding.mesh.jax.devices", lambda: one)
        patch.setattr("train.loop.jax.device_count", lambda: 1)
        folder = train(load("quickstart", [*settings, "export.merge=false"]))
        adapter = folder.rename(tmp_path / "attached")
        merged = train(load("quickstart", [*settings, "export.merge=true"]))
    row = sft.chat_rows(str(real))[0]["tokens"][None]

    def ours(model):
        source = resolve(model)
        params = load_params(source, dtype=np.float32)
        where = jnp.arange(row.shape[1])[None]
        compute = Compute(jnp.float32, "reference")
        apply = lambda p: forward(source.arch, compute, p, jnp.asarray(row), where, jnp.ones_like(where))  # noqa: E731
        return np.asarray(logits(jax.jit(apply)(params), head_of(source.arch, params)))

    def theirs(model):
        with torch.no_grad():
            return model.eval()(torch.tensor(row.astype(np.int64))).logits.numpy()

    base = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    before = theirs(base)
    mine = ours(adapter)
    assert np.abs(mine - before).max() > 0.1, "the run has changed nothing"
    # base_model_name_or_path is what the recipe said
    with_adapter = theirs(PeftModel.from_pretrained(base, adapter / "export"))
    whole = theirs(AutoModelForCausalLM.from_pretrained(merged / "export", dtype=torch.float32))
    far = np.abs(mine - with_adapter).max(), np.abs(mine - whole).max()
    print(f"logits: adapter in peft {far[0]:.1e}, merged in transformers {far[1]:.1e} apart")
    assert max(far) < 2e-4

"""The load-balance loss against transformers, through the training loss, and adapters against PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.compute import Compute
from model.families import architecture_from_hf
from tests.golden import families
from train.losses.lm import lm_loss

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_load_balance_loss_and_its_gradient(name, tmp_path):
    import torch

    from tests.golden import make_families

    torch.set_num_threads(1)
    config = {**families.CONFIGS[name], "output_router_logits": True, "router_aux_loss_coef": 0.3}
    b = families.batch()
    model = make_families.load(make_families.write(tmp_path / "m", config), torch.float32)
    # transformers' own loss: labels shifted there, padding left out by -100; the load-balance loss is added to it
    labels = torch.tensor(np.where(b["segments"] > 0, b["tokens"], -100)).long()
    labels[1, families.PADDED] = -100  # nothing before it predicts the first token
    out = model(
        torch.tensor(b["tokens"]).long(), attention_mask=torch.tensor(b["segments"]).long(),
        position_ids=torch.tensor(b["positions"]).long(), labels=labels,
    )  # fmt: skip
    out.loss.backward()
    from transformers.core_model_loading import revert_weight_conversion

    theirs = revert_weight_conversion(model, {name: p.grad for name, p in model.named_parameters()})
    arch = architecture_from_hf(config)
    batch = {name: jnp.asarray(column) for name, column in b.items()}
    norms = {"tokens": batch["weights"].sum()}
    assert arch.experts is not None
    router = (arch.experts.aux_loss_coef, 0.0)

    def loss(params):
        return lm_loss(params, batch, norms, arch=arch, compute=Compute(), router=router)

    params = families.params_of(arch, families.tensors(config), jnp.float32)
    (total, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    aux = float(sums["aux_loss"][0] / sums["aux_loss"][1])
    print(f"{name}: loss {float(total):.6f}, {out.loss.item():.6f}; aux {aux:.6f}, {out.aux_loss.item():.6f}")
    assert aux == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert float(total) == pytest.approx(out.loss.item(), rel=1e-5)
    for key, ours in families.theirs_of(arch, jax.tree.map(np.asarray, grads)).items():
        g = theirs[key].numpy()
        assert np.linalg.norm(ours - g) < 1e-5 * (np.linalg.norm(g) or 1), key

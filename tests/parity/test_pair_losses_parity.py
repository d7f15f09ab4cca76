"""Preference losses against TRL's own code: its trainers' loss functions run on models that answer given log-probs."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.losses import unpaired
from train.losses.pairs import Pairs, diverge, ld_weights, per_token, reward_metrics, wpo_weight
from train.losses.preference import LOSSES, combine

pytestmark = pytest.mark.parity

P, T = 6, 15
DPO = "sigmoid sigmoid_norm hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down"
SMOOTHED = {"exo_pair": 0.1, "robust": 0.2, "aot": 0.1, "aot_unpaired": 0.3}
MPO = (("sigmoid", 0.8), ("bco_pair", 0.2))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def numbers(rows, seed=0):
    """Token log-probs of policy and reference [rows, T], the completions' mask, and logs of sum p^2."""
    rng = np.random.default_rng(seed)
    start, length = rng.integers(1, 5, rows), rng.integers(1, 10, rows)
    at = np.arange(T)[None]
    mask = (at >= start[:, None]) & (at < (start + length)[:, None])
    ref = -rng.uniform(0.1, 4, (rows, T)) * mask
    policy = np.minimum(ref + rng.normal(0, 1, (rows, T)), -0.02) * mask
    return policy, ref, mask, -rng.uniform(0.1, 4, (rows, T))


class Model:
    """What TRL's loss functions read from a model that computes log-probs itself."""

    training, is_gradient_checkpointing, _modules = True, False, {}

    def __init__(self, logps, squares):
        self.logps, self.squares = logps, squares

    def __call__(self, **inputs):
        rest = self.logps.detach()
        return SimpleNamespace(
            log_probs=self.logps, log_sum_sq_probs=self.squares, entropy=rest, mean_logits=rest, is_top1=rest > -1
        )


def trainer(policy, ref, **attributes):
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        model=policy,
        ref_model=ref,
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def models(policy, ref, squares, dtype):
    import torch

    leaf = torch.tensor(policy, dtype=dtype, requires_grad=True)
    squares = torch.tensor(squares, dtype=dtype)
    return leaf, Model(leaf, squares), Model(torch.tensor(ref, dtype=dtype), squares)


def inputs(mask, **more):
    import torch

    whole = np.insert(mask, 0, False, axis=1)  # TRL drops the first position
    ids = torch.ones(whole.shape, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": torch.tensor(whole, dtype=torch.long), **more}


def trl_dpo(terms, beta, smoothing, ld_alpha=None, divergence=("reverse_kl", 0.5), weighted=False, single=False):
    """(loss, gradient, metrics) of DPOTrainer."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    policy, ref, mask, squares = numbers(2 * P)
    leaf, model, reference = models(policy, ref, squares, torch.float32 if single else torch.float64)
    stub = trainer(
        model,
        reference,
        loss_types=[name for name, _ in terms],
        loss_weights=[weight for _, weight in terms],
        beta=beta,
        label_smoothing=smoothing,
        ld_alpha=ld_alpha,
        f_divergence_type=divergence[0],
        f_alpha_divergence_coef=divergence[1],
        use_weighting=weighted,
    )
    loss = DPOTrainer._compute_loss(stub, model, inputs(mask), False)
    loss.backward()
    return loss.item(), leaf.grad.numpy() * mask, {name: x[-1] for name, x in stub._metrics["train"].items()}


def our_dpo(terms, beta, smoothing, ld_alpha=1.0, divergence=None, weighted=False, dtype=jnp.float64, sft=0.0):
    """The same of this package: sums over tokens, the table's losses, a mean over pairs."""
    policy, ref, mask, squares = (jnp.asarray(x) for x in numbers(2 * P))
    lengths = mask.sum(1)
    position = jnp.cumsum(mask, axis=1) - 1
    shared = jnp.tile(jnp.minimum(lengths[:P], lengths[P:]), 2)[:, None]
    weights = ld_weights(mask.astype(dtype), position, shared, ld_alpha)

    def pairs_of(logps):
        sums, refs = (logps * weights).sum(1), (ref.astype(dtype) * weights).sum(1)
        return Pairs(sums[:P], sums[P:], refs[:P], refs[P:], lengths[:P], lengths[P:])

    given = {"beta": beta, "label_smoothing": smoothing}
    for name, _ in terms:
        if LOSSES[name].score:
            given.update(LOSSES[name].score(pairs_of(policy), jnp.ones(P, bool)))

    def loss(logps):
        pairs = pairs_of(logps)
        losses = combine(diverge(pairs, *divergence) if divergence else pairs, terms, given)
        if weighted:
            scale = wpo_weight((logps * mask).sum(1), (squares * mask).sum(1), lengths)
            losses *= scale[:P] * scale[P:]
        return losses.mean() - sft * (logps * mask)[:P].sum() / lengths[:P].sum()

    value, grad = jax.value_and_grad(loss)(policy.astype(dtype))
    metrics = reward_metrics(pairs_of(policy), jnp.ones(P, bool), beta=beta)
    return value, grad, {name: total / weight for name, (total, weight) in metrics.items()}


def tolerance(name):
    return 1e-6 if name == "exo_pair" else 1e-12  # TRL has the logs of its label smoothing in float32


def check(ours, theirs, tolerance=1e-12):
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert np.linalg.norm(ours[1] - theirs[1]) < tolerance * np.linalg.norm(theirs[1])
    for name, value in ours[2].items():
        assert value == pytest.approx(theirs[2][name], rel=max(tolerance, 1e-6)), name  # TRL's accuracy is float32


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", [*DPO.split(), "discopop"])
def test_dpo(name, beta):
    """Every loss type of TRL's DPOTrainer: loss, gradient of every token's log-prob, metrics."""
    e = SMOOTHED.get(name, 0.0)
    check(our_dpo(((name, 1.0),), beta, e), trl_dpo(((name, 1.0),), beta, e), tolerance(name))


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot_unpaired"])
def test_ld_dpo(name):
    found = our_dpo(((name, 1.0),), 0.2, 0.1, ld_alpha=0.3)
    check(found, trl_dpo(((name, 1.0),), 0.2, 0.1, ld_alpha=0.3))


def test_mpo_and_wpo():
    check(our_dpo(MPO, 0.1, 0.0, sft=1.0), trl_dpo((*MPO, ("sft", 1.0)), 0.1, 0.0))
    check(our_dpo(MPO, 0.1, 0.0, weighted=True), trl_dpo(MPO, 0.1, 0.0, weighted=True))


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"])
def test_divergences(name, kind):
    args, single = (((name, 1.0),), 0.1, SMOOTHED.get(name, 0.0)), kind == "alpha_divergence"  # no float64 in TRL
    ours = our_dpo(*args, divergence=(kind, 0.3), dtype=jnp.float32 if single else jnp.float64)
    check(ours, trl_dpo(*args, divergence=(kind, 0.3), single=single), 1e-5 if single else tolerance(name))


@pytest.mark.parametrize(
    ("name", "theirs", "constants"),
    [
        ("cpo", "sigmoid", {"label_smoothing": 0.2}),
        ("cdpo", "sigmoid", {"label_smoothing": 0.2}),  # DPO's smoothing; the reference is 0 here
        ("hinge", "hinge", {}),
        ("simpo", "simpo", {"simpo_gamma": 0.7, "label_smoothing": 0.1}),
        ("alphapo", "simpo", {"simpo_gamma": 0.7, "alpha": 0.25}),
        ("alphapo", "simpo", {"simpo_gamma": 0.7, "alpha": -0.5}),
    ],
)
def test_cpo(name, theirs, constants):
    """TRL's CPOTrainer, which takes means where the loss type says so."""
    import torch
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    policy, _, mask, _ = numbers(2 * P)
    sums, lengths = policy.sum(1), mask.sum(1)
    settings = {"label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.0, **constants}
    stub = SimpleNamespace(beta=2.0, loss_type=theirs, accelerator=SimpleNamespace(device="cpu"), **settings)
    leaf = torch.tensor(sums, requires_grad=True)
    per = leaf / torch.tensor(lengths) if theirs == "simpo" else leaf
    losses, *rewards = CPOTrainer.cpo_loss(stub, per[:P], per[P:])
    losses.sum().backward()

    def pairs_of(sums):
        return Pairs(sums[:P], sums[P:], jnp.zeros(P), jnp.zeros(P), jnp.asarray(lengths[:P]), jnp.asarray(lengths[P:]))

    ours, pull = jax.vjp(lambda x: combine(pairs_of(x), ((name, 1.0),), {"beta": 2.0, **constants}), jnp.asarray(sums))
    np.testing.assert_allclose(ours, losses.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(pull(jnp.ones(P))[0], leaf.grad.numpy(), rtol=1e-11, atol=1e-15)
    if name != "alphapo":  # TRL logs shaped rewards, reward_metrics plain ones
        pairs = per_token(pairs_of(jnp.asarray(sums))) if LOSSES[name].token_means else pairs_of(jnp.asarray(sums))
        found = reward_metrics(pairs, jnp.ones(P, bool), beta=2.0)
        for side, want in zip(("chosen", "rejected"), rewards, strict=True):
            np.testing.assert_allclose(found[f"rewards/{side}"][0], want.numpy().sum(), rtol=1e-12)


def test_orpo():
    """TRL's ORPOTrainer computes the odds in float32, and returns the term negated."""
    import torch
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    policy, _, mask, _ = numbers(2 * P)
    sums, lengths = policy.sum(1), jnp.asarray(mask.sum(1))
    leaf = torch.tensor(sums, requires_grad=True)
    per = leaf / torch.tensor(mask.sum(1))
    stub = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(stub, per[:P], per[P:])[0]
    theirs.sum().backward()

    def loss(sums):
        zeros = jnp.zeros(P)
        return combine(
            Pairs(sums[:P], sums[P:], zeros, zeros, lengths[:P], lengths[P:]), (("orpo", 1.0),), {"beta": 0.3}
        )

    ours, pull = jax.vjp(loss, jnp.asarray(sums))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones(P))[0], leaf.grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, -1.0])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto(name, shift):
    """KTOTrainer, with a baseline above 0 and one clipped at 0."""
    import torch
    from trl.trainer.kto_trainer import KTOTrainer

    policy, ref, mask, squares = numbers(2 * P, seed=1)
    mismatched = numbers(2 * P, seed=2)[1].sum(1)
    label = np.arange(2 * P) % 3 > 0
    leaf, model, reference = models(policy, ref, squares, torch.float64)
    kl = {id(model): torch.tensor(mismatched + shift), id(reference): torch.tensor(mismatched)}
    stub = trainer(
        model, reference, beta=0.2, loss_type=name, calculate_KL=name == "kto", desirable_weight=1.2,
        undesirable_weight=0.8, _compute_kl_logps=lambda model, batch: kl[id(model)],
    )  # fmt: skip
    theirs = KTOTrainer._compute_loss(stub, model, inputs(mask, label=torch.tensor(label)), False)
    theirs.backward()
    given = {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    columns = unpaired.kto_columns(jnp.asarray(mismatched + shift), jnp.asarray(mismatched), jnp.ones(2 * P, bool))

    def examples(logps):
        return unpaired.Unpaired((logps * mask).sum(1), jnp.asarray(ref.sum(1)), jnp.asarray(label))

    ours, grad = jax.value_and_grad(
        lambda logps: combine(examples(logps), ((name, 1.0),), {**given, **columns}).mean()
    )(jnp.asarray(policy))
    assert ours == pytest.approx(theirs.item(), rel=1e-12)
    np.testing.assert_allclose(grad, leaf.grad.numpy() * mask, rtol=1e-11, atol=1e-16)
    logged = {key: x[-1] for key, x in stub._metrics["train"].items()}
    if name == "kto":
        assert columns["z0"][0] == pytest.approx(logged["kl"], rel=1e-12)
    found = unpaired.reward_metrics(examples(jnp.asarray(policy)), jnp.ones(2 * P, bool), beta=0.2)
    for key, (total, weight) in found.items():
        assert total / weight == pytest.approx(logged[key], rel=1e-12), key

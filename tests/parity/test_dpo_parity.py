"""Preference losses on whole models against TRL's trainers: their forward passes, their losses; every gradient."""

from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.objective import Objective
from configs.schema import Data
from convert.load import load_params, resolve
from data.pack import COLUMNS, fill_row, pack_window
from data.pairs import fit_pair
from model.compute import Compute
from model.tree import flatten, join, split
from tests.golden import sft
from tests.train import tiny
from train.losses import packed
from train.recipes import make_recipe
from train.step import denominators, split_batch, with_columns

pytestmark = pytest.mark.parity

T = 48


@pytest.fixture(scope="module")
def oracle():
    from tests.golden import make_sft

    return make_sft


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and an adapter on it: with the adapter it is the policy, without it the reference."""
    folder = sft.make_tiny(tmp_path_factory.mktemp("dpo") / "tiny")
    return folder, sft.make_adapter(folder.with_name("adapter"), folder)


def rows(vocabulary=300, seed=3, count=7):
    """(prompt, chosen, rejected) of very uneven lengths."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(4, vocabulary, rng.integers(low, high)).tolist()  # noqa: E731
    return [(draw(1, 9), draw(1, 14), draw(1, 14)) for _ in range(count)]


def policy_of(oracle, folder, adapter, dtype):
    """Their base, with the adapter on it if there is one."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.get_input_embeddings().padding_idx = None
    if dtype == torch.float64:
        model = oracle.in_double(model, folder)
    if adapter is None:
        return model
    return PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False).to(dtype)


def gradients(model):
    return {
        name.replace(".default.weight", ".weight"): p.grad.numpy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def theirs(oracle, folder, adapter, examples, dtype, method="DPO", reference=None, **options):
    """(loss, {name: gradient}, metrics): TRL's trainer on the adapter, the reference is the model without it.

    With a reference, a folder, it trains every weight of the model itself.
    """
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer import utils

    model = policy_of(oracle, folder, None if reference else adapter, dtype)
    other = policy_of(oracle, reference, None, dtype) if reference else None
    config = getattr(trl, f"{method}Config")(
        str(adapter.with_name("scratch")), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=len(examples), **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    blank = {
        "DPO": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "KTO": {"prompt": "a", "completion": "b", "label": True},
    }
    data = Dataset.from_list([blank[method]] * len(examples))
    trainer = getattr(trl, f"{method}Trainer")(
        model, other, args=config, train_dataset=data, processing_class=tokenizer
    )
    # a copy named "ref" would be made of an adapter given as it is: here the reference is the base
    if other is None and "ref" in model.peft_config:
        model.delete_adapter("ref")
    batch = trainer.data_collator(examples)
    model.train()
    kernel = oracle.ExactLogProbs if dtype == torch.float64 else utils._ChunkedLogProbFunction
    with mock.patch.object(utils, "_ChunkedLogProbFunction", kernel):
        loss = trainer._compute_loss(model, batch, False)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients(model), metrics


def paired(pairs):
    return [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]


def theirs_free(oracle, folder, adapter, pairs, dtype, method, **settings):
    """(loss, {name: gradient}): TRL's experimental trainers without a reference, on padded rows."""
    import importlib

    import torch

    module = importlib.import_module(f"trl.experimental.{method.lower()}.{method.lower()}_trainer")
    kind = getattr(module, f"{method}Trainer")
    model = policy_of(oracle, folder, adapter, dtype)
    trainer = object.__new__(kind)
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer.__dict__ |= {
        "accelerator": accelerator, "is_encoder_decoder": False, "aux_loss_enabled": False, "pad_token_id": 0,
        "padding_value": 0, **settings,
    }  # fmt: skip
    batch = {}
    for side, of in (("chosen", 1), ("rejected", 2)):
        size = max(len(pair[0]) + len(pair[of]) for pair in pairs)
        ids, mask, labels = (torch.full((len(pairs), size), value) for value in (0, 0, -100))
        for i, pair in enumerate(pairs):
            start, end = len(pair[0]), len(pair[0]) + len(pair[of])
            ids[i, :end], mask[i, :end] = torch.tensor([*pair[0], *pair[of]]), 1
            labels[i, start:end] = ids[i, start:end]
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    loss, _ = trainer.get_batch_loss_metrics(model.train(), batch)
    loss.backward()
    return loss.item(), gradients(model)


def ours(adapter, examples, dtype, pieces=2, jit=jax.jit, other=None, **options):
    """The same of ours: packed rows, prompts shared, two micro-batches. examples: columns.

    other: the reference, if it is a model; then every weight of the MODEL `adapter` is trained.
    """
    source = resolve(adapter)
    params = load_params(source, dtype=np.dtype(dtype))
    trainable, frozen = split(params, lambda path: other is not None or path.endswith(("/a", "/b")))
    plan = pack_window([len(e["tokens"]) for e in examples], T, 0)
    plan += [[]] * (-len(plan) % pieces)
    filled = [fill_row([examples[i] for i in row], T, more=tuple(set(examples[0]) - set(COLUMNS))) for row in plan]
    batch = {name: jnp.asarray(np.stack([row[name] for row in filled])) for name in filled[0]}
    batch["weights"] = batch["weights"].astype(dtype)
    objective = Objective(**{"type": "dpo", "reference": "adapterless", "loss_chunk": 32, **options})
    if other is not None:
        model = {"arch": source.arch, "compute": Compute(dtype, "reference"), "chunk": 32}
        batch["ref_logprobs"] = packed.policy_logprobs(
            load_params(resolve(other), dtype=np.dtype(dtype)), batch, **model
        )
    recipe = make_recipe(objective, source.arch, Compute(dtype, "reference", "full"))

    def loss(trainable):
        params = join(trainable, frozen)
        whole, _ = with_columns(recipe.columns, trainable, frozen, {}, batch, pieces)
        norms, parts, total, sums = denominators(recipe.weights, whole), split_batch(whole, pieces), 0.0, []
        for i in range(pieces):
            part, metrics = recipe.loss(params, jax.tree.map(lambda x: x[i], parts), norms)  # noqa: B023
            total, sums = total + part, [*sums, metrics]
        return total, jax.tree.map(lambda *x: sum(x), *sums)

    (value, sums), grads = jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    metrics = {name: float(t / w) for name, (t, w) in sums.items() if np.ndim(t) == 0}
    return (
        float(value),
        sft.named({p: np.asarray(g) for p, g in flatten(grads).items()}, source, other is None),
        metrics,
    )


def columns_of(pairs):
    """Pairs as examples of ours."""
    made = []
    for prompt, *completions in pairs:
        sides = []
        for completion in completions:
            weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(completion))])
            sides.append({"tokens": np.asarray([*prompt, *completion], np.int32), "weights": weights})
        made.append(fit_pair(tuple(sides), Data(train=("x",), max_length=T))[0])
    return made


CASES = {
    **{
        name: {"loss_type": [name]}
        for name in "sigmoid sigmoid_norm hinge ipo nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
        "discopop".split()
    },
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.7]},
    "js": {"f_divergence_type": "js_divergence"},
    "ld": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
}


def as_ours(options):
    """Our names for TRL's options."""
    mine = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if "sft" in mine.get("loss_type", ()):  # a loss type of TRL's, a weight of ours
        kinds, weights = mine.pop("loss_type"), mine.pop("loss_weights")
        at = kinds.index("sft")
        mine |= {"loss_type": kinds[:at], "loss_weights": weights[:at], "sft_weight": weights[at]}
    return mine


@pytest.mark.parametrize(
    ("dtype", "tolerance", "case"),
    # TRL takes exo_pair's log(label_smoothing) in float32 always: 3e-8 off in float64
    [("float32", 1e-5, case) for case in CASES] + [("float64", 1e-9, case) for case in CASES if case != "exo_pair"],
)
def test_tiny(oracle, models, case, dtype, tolerance):
    import torch

    options, pairs = {"beta": 0.3, **CASES[case]}, rows()
    want, expected, told = theirs(oracle, *models, paired(pairs), getattr(torch, dtype), **options)
    with jax.enable_x64(dtype == "float64"):
        value, grads, metrics = ours(models[1], columns_of(pairs), jnp.dtype(dtype), **as_ours(options))
    far = sft.apart(grads, expected)
    worst = max(far, key=far.__getitem__)
    print(f"{case} {dtype}: loss {abs(value / want - 1):.1e} apart; worst gradient {far[worst]:.1e} ({worst})")
    assert abs(value / want - 1) < tolerance
    assert far[worst] < tolerance, worst
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert metrics[name] == pytest.approx(told[name], rel=10 * tolerance, abs=10 * tolerance), name
    assert metrics["rewards/accuracies"] == pytest.approx(told["rewards/accuracies"], abs=1e-6)  # TRL's is a float32


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_every_weight_and_another_reference(oracle, models, tmp_path, dtype, tolerance):
    import torch

    other = tiny.make_model(tmp_path / "other", seed=12)
    want, expected, told = theirs(
        oracle, *models, paired(rows()), getattr(torch, dtype), reference=other, beta=0.3, loss_type=["sigmoid", "sft"]
    )
    with jax.enable_x64(dtype == "float64"):
        value, grads, metrics = ours(
            models[0], columns_of(rows()), jnp.dtype(dtype), other=other, beta=0.3, sft_weight=1.0, reference="model",
            reference_model=str(other), loss_type=("sigmoid",),
        )  # fmt: skip
    far = sft.apart(grads, expected)
    worst = max(far, key=far.__getitem__)
    print(f"every weight {dtype}: loss {abs(value / want - 1):.1e} apart; worst gradient {far[worst]:.1e} ({worst})")
    assert len(grads) == len(expected) > 15
    assert abs(value / want - 1) < tolerance
    assert far[worst] < tolerance, worst
    assert metrics["rewards/margins"] == pytest.approx(told["rewards/margins"], rel=10 * tolerance, abs=10 * tolerance)


SIMPO = {"beta": 2.0, "loss_type": "simpo", "label_smoothing": 0.0, "cpo_alpha": 0.0, "simpo_gamma": 1.2}
FREE = {
    "orpo": (
        ("ORPO", {"beta": 0.3}),
        {"loss_type": ("orpo",), "beta": 0.3, "sft_weight": 1.0, "sft_tokens": "sequence"},
    ),
    "cpo": (
        ("CPO", {"beta": 0.3, "loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": 0.7, "alpha": 0.0}),
        {"loss_type": ("cpo",), "beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.7},
    ),
    "simpo": (
        ("CPO", {**SIMPO, "alpha": 0.0}),
        {"loss_type": ("simpo",), "beta": 2.0, "simpo_gamma": 1.2},
    ),
    "alphapo": (
        ("CPO", {**SIMPO, "alpha": 0.25}),
        {"loss_type": ("alphapo",), "beta": 2.0, "simpo_gamma": 1.2, "alpha": 0.25},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FREE)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_without_reference(oracle, models, case, dtype, tolerance):
    import torch

    if case == "orpo" and dtype == "float64":
        tolerance = 1e-6  # TRL takes the odds in float32 always
    (method, settings), options = FREE[case]
    pairs = rows()
    want, expected = theirs_free(oracle, *models, pairs, getattr(torch, dtype), method, **settings)
    with jax.enable_x64(dtype == "float64"):
        value, grads, _ = ours(models[1], columns_of(pairs), jnp.dtype(dtype), reference="none", **options)
    far = sft.apart(grads, expected)
    worst = max(far, key=far.__getitem__)
    print(f"{case} {dtype}: loss {abs(value / want - 1):.1e} apart; worst gradient {far[worst]:.1e} ({worst})")
    assert abs(value / want - 1) < tolerance
    assert far[worst] < tolerance, worst


LABELS = (True, False, True, True, False, False, True)
KTO = {
    name: {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6, "loss_type": name}
    for name in ("kto", "apo_zero_unpaired")
}


def labelled(case):
    """(what TRL's collator takes, examples of ours): the prompts and chosen answers of `rows`, labelled."""
    own = [(prompt, completion) for prompt, completion, _ in rows()]
    before = [completion for _, completion in own[-1:] + own[:-1]]
    given = [{"prompt_ids": p, "completion_ids": c, "label": label} for (p, c), label in zip(own, LABELS, strict=True)]
    if case == "kto":
        given = [{**row, "KL_completion_ids": other} for row, other in zip(given, before, strict=True)]
    examples = []
    for columns, label in zip(columns_of([(*a, b) for a, b in zip(own, before, strict=True)]), LABELS, strict=True):
        if case != "kto":
            columns = {name: column[columns["branches"] < 2] for name, column in columns.items()}
        examples.append({**columns, "desirable": np.full(len(columns["tokens"]), label, np.float32)})
    return given, examples


def theirs_kto(oracle, folder, adapter, case, dtype):
    """(loss, {name: gradient}, metrics) of KTOTrainer."""
    given, _ = labelled(case)
    return theirs(oracle, folder, adapter, given, dtype, "KTO", train_sampling_strategy="sequential", **KTO[case])


@pytest.mark.parametrize("case", KTO)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_kto(oracle, models, case, dtype, tolerance):
    import torch

    want, expected, told = theirs_kto(oracle, *models, case, getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        value, grads, metrics = ours(models[1], labelled(case)[1], jnp.dtype(dtype), type="kto", **KTO[case])
    far = sft.apart(grads, expected)
    worst = max(far, key=far.__getitem__)
    print(f"{case} {dtype}: loss {abs(value / want - 1):.1e} apart; worst gradient {far[worst]:.1e} ({worst})")
    assert abs(value / want - 1) < tolerance
    assert far[worst] < tolerance, worst
    for name, other in (("rewards/chosen", "rewards/chosen"), ("rewards/rejected", "rewards/rejected"), ("z0", "kl")):
        if name in metrics:
            assert metrics[name] == pytest.approx(told[other], rel=10 * tolerance, abs=10 * tolerance), name

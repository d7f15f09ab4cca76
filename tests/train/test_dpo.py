"""Preference training as a whole: the loss and every gradient from packed rows, however they are cut, are those of one
pair at a time; whole runs with either kind of reference."""

import json
from contextlib import nullcontext, suppress
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_sigmoid

from configs.errors import RunError, UsageError
from configs.load import load
from configs.objective import Objective
from configs.schema import Data
from data.pack import fill_row, pack_window
from data.pairs import fit_pair
from model import lora
from model.compute import Compute
from model.head import head_of, logits
from model.transformer import forward, nest
from model.tree import flatten, split
from sharding.mesh import make_mesh
from sharding.place import place_batch
from sharding.rules import make_rules
from tests.train import tiny
from tests.train.test_step import ARCH, MESHES, adapters_of, weights_of
from train import score
from train.faults import StopSignal
from train.loop import train
from train.losses import packed, pairwise
from train.metrics import is_time
from train.recipes import BOTH_FELL, make_recipe
from train.step import denominators, split_batch, with_columns

T = 40
SEEDS = range(9)


def pair(seed):
    """Prompt, chosen and rejected of uneven lengths; completions may begin alike."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(3, 96, rng.integers(low, high)).tolist()  # noqa: E731
    prompt, both = draw(1, 7), draw(0, 3)
    return prompt, both + draw(1, 8), both + draw(1, 8)


def sides(prompt, chosen, rejected):
    made = []
    for completion in (chosen, rejected):
        weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(completion))]).astype(np.float32)
        made.append({"tokens": np.asarray([*prompt, *completion], np.int32), "weights": weights})
    return tuple(made)


def batch_of(share=True, rows=8):
    """All pairs, packed; the last rows are empty."""
    data = Data(train=("x",), max_length=T, share_prompt=share)
    made = [fit_pair(sides(*pair(seed)), data)[0] for seed in SEEDS]
    plan = pack_window([len(e["tokens"]) for e in made], T, 0)
    assert len(plan) <= rows
    filled = [fill_row([made[i] for i in row], T, more=("branches",)) for row in plan + [[]] * (rows - len(plan))]
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}


def totals(params, rows, dtype, each=False):
    """log p of each (prompt, completion)'s completion, every one alone in a row. each: the means of log p and of log of
    the sum of p^2 over the vocabulary instead."""
    size = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens, learnt = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size))
    for row, mask, (prompt, completion) in zip(tokens, learnt, rows, strict=True):
        row[: len(prompt) + len(completion)] = [*prompt, *completion]
        mask[len(prompt) : len(prompt) + len(completion)] = 1
    where = jnp.broadcast_to(jnp.arange(size), tokens.shape)
    out = forward(ARCH, Compute(dtype, "reference"), params, jnp.asarray(tokens), jnp.asarray(where), where * 0 + 1)
    said = jax.nn.log_softmax(logits(out, head_of(ARCH, params)))
    picked = jnp.take_along_axis(said[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    if each:
        squares = jax.nn.logsumexp(2 * said[:, :-1], axis=2)
        return [(x * learnt[:, 1:]).sum(1) / learnt.sum(1) for x in (picked, squares)]
    return (picked * learnt[:, 1:]).sum(1)


def plain(params, reference, dtype):
    """DPO at beta 0.3 as the paper writes it, one sequence a row."""
    rows = [(prompt, side) for prompt, *both in map(pair, SEEDS) for side in both]
    scores = (totals(params, rows, dtype) - totals(reference, rows, dtype)).reshape(-1, 2)
    return -log_sigmoid(0.3 * (scores[:, 0] - scores[:, 1])).mean()


OBJECTIVE = Objective(type="dpo", beta=0.3, reference="adapterless")


def policies(dtype):
    """A reference, and the policy: the same with adapters."""
    base = nest({path: jnp.asarray(x) for path, x in weights_of(dtype=dtype).items()})
    pairs = {p: (jnp.asarray(a), jnp.asarray(b)) for p, (a, b) in adapters_of(dtype=dtype).items()}
    return base, lora.attach(base, pairs, 0.5)


@pytest.mark.parametrize(
    ("share", "pieces"),
    [pytest.param(True, 1, marks=pytest.mark.slow), (True, 4), pytest.param(False, 1, marks=pytest.mark.slow)],
)
def test_loss_and_gradients_are_those_of_single_pairs(share, pieces):
    with jax.enable_x64(True):
        base, policy = policies(np.float64)
        recipe = make_recipe(OBJECTIVE, ARCH, Compute(jnp.float64, "reference"))
        batch = {name: jnp.asarray(column) for name, column in batch_of(share).items()}

        def ours(policy):
            whole, _ = with_columns(recipe.columns, *split(policy, lambda _: True), {}, batch, pieces)
            norms = denominators(recipe.weights, whole)
            parts = split_batch(whole, pieces)
            one = lambda i: recipe.loss(policy, jax.tree.map(lambda x: x[i], parts), norms)[0]  # noqa: E731
            return sum(one(i) for i in range(pieces))

        got, found = jax.jit(jax.value_and_grad(ours))(policy)
        want, expected = jax.jit(jax.value_and_grad(lambda p: plain(p, base, jnp.float64)))(policy)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    expected = flatten(expected)
    for path, value in flatten(found).items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("mesh", [pytest.param("data", marks=pytest.mark.slow), "2x2x2"])
@pytest.mark.parametrize(
    "loss_type",
    [
        pytest.param(("sigmoid",), marks=pytest.mark.slow),
        ("aot", "sppo_hard"),
        pytest.param(("simpo",), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing(mesh, loss_type):
    _, policy = policies(np.float32)
    objective = OBJECTIVE.model_copy(update={"loss_type": loss_type})
    batch = batch_of()

    def value(mesh, pieces):
        rules, grid = make_rules("fsdp", {}), make_mesh(MESHES[mesh], jax.devices()[: 1 if mesh == "1" else 8])
        recipe = make_recipe(objective, ARCH, Compute(jnp.float32, "reference", rules=rules))

        def loss(policy, batch):
            whole, _ = with_columns(recipe.columns, *split(policy, lambda _: True), {}, batch, pieces)
            return recipe.loss(policy, whole, denominators(recipe.weights, whole))[0]

        with jax.set_mesh(grid):
            return jax.jit(jax.value_and_grad(loss))(policy, place_batch(batch, grid, rules))

    (want, expected), (got, found) = value("1", 1), value(mesh, 2)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    norm = lambda tree: float(jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree))))  # noqa: E731
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, expected)
    assert norm(difference) < 2e-5 * norm(expected)


def test_places_in_a_completion():
    batch = {name: jnp.asarray(column) for name, column in batch_of().items()}
    place = np.asarray(packed._place(batch))
    for row in range(8):
        for segment in range(1, int(batch["segments"][row].max()) + 1):
            for branch in (1, 2):
                own = np.asarray((batch["segments"][row] == segment) & (batch["branches"][row] == branch))
                learnt = own & (np.asarray(batch["weights"][row]) > 0)
                assert place[row][learnt].tolist() == list(range(learnt.sum()))


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """60 pairs: the chosen answers are words, the rejected ones begin with zz."""
    rng = np.random.default_rng(0)
    say = lambda most: " ".join(rng.choice(tiny.WORDS, rng.integers(1, most)))  # noqa: E731
    rows = [{"prompt": say(4), "chosen": say(5), "rejected": f"zz {say(5)}"} for _ in range(60)]
    messages = [
        {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows
    ]  # the answers become messages
    return tiny.write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", messages)


@pytest.fixture
def run_of(tmp_path, tiny_model, preferences, monkeypatch):
    """run_of(name, *overrides) -> metrics of a whole run on one device."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name, *more):
        folder = tmp_path / name
        train(load("dpo", tiny.overrides(folder, tiny_model, preferences, "data.max_length=64", *more)))
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    with tiny.one_device():
        yield run


LORA = (
    "export.enabled=false",
    "train.batch_size=16",
    "tune.method=lora",
    "tune.r=4",
    "optim.learning_rate=1e-2",
    "optim.weight_decay=0",
)


@pytest.mark.slow
def test_runs_with_either_reference_are_the_same(run_of, tmp_path):
    cached = run_of("cached", *LORA)
    (file,) = (tmp_path / "cache" / "purestep" / "reference").iterdir()
    online = run_of("online", *LORA, "objective.reference=adapterless", "train.microbatches=2")
    for a, b in zip(cached, online, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=1e-4)
    assert cached[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert cached[-1]["loss"] < 0.3
    assert cached[-1]["rewards/accuracies"] == 1
    before = file.stat().st_mtime_ns
    run_of("again", *LORA)
    assert file.stat().st_mtime_ns == before, "found on disk"


def test_an_interrupted_reference_goes_on(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr(score, "SECONDS", 0.0)
    write, kept = score._write, []

    def interrupt(path, columns):
        write(path, columns)
        kept.append(len(columns))
        if len(kept) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score, "_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_of("cut", *LORA, "train.steps=1", "train.batch_size=2")
    (part,) = (tmp_path / "cache" / "purestep" / "reference").iterdir()
    assert part.name.endswith(".part.npz")
    marked = {index: column + 1 for index, column in score._read(part).items()}
    write(part, marked)
    with suppress(RunError):  # the first step may stumble over the mark
        run_of("cut", *LORA, "train.steps=1", "train.batch_size=2")
    (whole,) = (tmp_path / "cache" / "purestep" / "reference").iterdir()
    columns = score._read(whole)
    assert len(columns) == 60 > len(marked)
    assert all((columns[index] == column).all() for index, column in marked.items())


@pytest.mark.parametrize("recipe", ["orpo", "simpo", "kto"])
def test_the_other_recipes_take_two_steps(tmp_path, tiny_model, preferences, recipe):
    more = (
        "data.max_length=64",
        "train.steps=2",
        "log.samples=null",
        "export.enabled=false",
        "checkpoint.enabled=false",
    )
    with tiny.one_device():
        train(load(recipe, tiny.overrides(tmp_path / "run", tiny_model, preferences, *more)))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[1]["loss"] < rows[0]["loss"] + 0.1
    assert (rows[0]["loss"] == pytest.approx(0.5, abs=1e-4)) == (recipe == "kto")


def test_a_reference_of_another_model_is_noticed(run_of, monkeypatch):
    compute = score._compute
    monkeypatch.setattr("train.score._compute", lambda *a: {i: x * 1.05 for i, x in compute(*a).items()})
    with pytest.raises(RunError, match=r"equals its reference has 0\.6931"):
        run_of("wrong")


@pytest.mark.slow
def test_the_reference_may_be_another_model(run_of, tiny_model, tmp_path):
    own = run_of("own", *LORA, "train.steps=2")
    model = ("objective.reference=model", f"objective.reference_model={tiny_model}")
    same = run_of("same", *LORA, *model, "train.steps=2")
    assert [row["loss"] for row in same] == [row["loss"] for row in own]
    other = tiny.make_model(tmp_path / "other", seed=5)
    found = run_of("other", *LORA, model[0], f"objective.reference_model={other}", "train.steps=2")
    assert abs(found[0]["loss"] - np.log(2)) > 1e-3
    larger = tiny.make_model(tmp_path / "larger", vocab_size=352)
    with pytest.raises(UsageError, match="has 352 tokens, model"):
        run_of("larger", *LORA, model[0], f"objective.reference_model={larger}")


@pytest.mark.slow
@pytest.mark.parametrize("method", [LORA, ("train.batch_size=16", "optim.learning_rate=1e-3")], ids=["lora", "full"])
def test_a_reference_that_follows(run_of, method):
    """TR-DPO: a copy that never follows is the start, one that follows at once is the policy."""
    moving = (*method, "objective.reference=moving", "train.steps=4")
    still = run_of("still", *moving, "objective.ref_model_sync_steps=100")
    start = run_of("start", *method, "train.steps=4")
    for a, b in zip(still, start, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
    at_once = run_of("at_once", *moving, "objective.ref_model_sync_steps=1", "objective.ref_model_mixup_alpha=1")
    assert [row["loss"] for row in at_once] == pytest.approx([np.log(2)] * 4, abs=1e-6)
    assert still[-1]["loss"] < 0.69
    half = run_of("half", *moving, "objective.ref_model_sync_steps=2", "objective.ref_model_mixup_alpha=0.5")
    assert [row["loss"] for row in half[:2]] == [row["loss"] for row in still[:2]]
    assert abs(half[2]["rewards/margins"]) < abs(still[2]["rewards/margins"])


def test_what_is_carried_is_resumed(run_of, monkeypatch):
    """The copy and the running mean of rewards are part of a checkpoint."""
    carried = (
        *LORA, "objective.reference=moving", "objective.ref_model_sync_steps=5", "objective.loss_type=bco_pair",
        "objective.bco_baseline=running", "train.steps=8",
    )  # fmt: skip
    whole = run_of("whole", *carried)

    class AtThree(StopSignal):
        def __call__(self, step):
            return step == 3

    with monkeypatch.context() as patch:
        patch.setattr("train.loop.stop_signal", lambda: nullcontext(AtThree()))
        assert len(run_of("halves", *carried)) == 3
    resumed = run_of("halves", *carried)
    drop = lambda rows: [{k: v for k, v in row.items() if not is_time(k)} for row in rows]  # noqa: E731
    assert drop(resumed) == drop(whole)


def test_the_running_baseline_is_the_mean_of_all_rewards():
    """BCO's delta (arXiv 2404.04656): of chosen and rejected, of this batch and all before."""
    _, policy = policies(np.float32)
    objective = OBJECTIVE.model_copy(update={"loss_type": ("bco_pair",), "bco_baseline": "running"})
    recipe = make_recipe(objective, ARCH, Compute(jnp.float32, "reference"))
    batch = {name: jnp.asarray(column) for name, column in batch_of().items()}
    assert recipe.columns.start is not None
    carried, rewards = recipe.columns.start({}), []
    assert carried == {"rewards": {"mean": 0, "count": 0}}
    for scale in (1.0, -2.0):
        moved = jax.tree_util.tree_map_with_path(lambda p, x: scale * x if str(p[-1]) == ".b" else x, policy)  # noqa: B023
        whole, carried = with_columns(recipe.columns, *split(moved, lambda _: True), carried, batch, 2)
        pairs = packed.pairs_of(whole["logprobs"], whole)
        real = np.asarray(packed.pair_mask(whole))
        rewards += [0.3 * np.asarray(score)[real] for score in pairs.scores]
        assert carried["rewards"]["count"] == sum(map(len, rewards))
        np.testing.assert_allclose(np.asarray(whole["delta"]), np.concatenate(rewards).mean(), rtol=1e-5, atol=1e-6)


def test_wpo_weighs_pairs_and_orpo_counts_prompts():
    _, policy = policies(np.float32)
    batch = {name: jnp.asarray(column) for name, column in batch_of().items()}
    segments, branches = np.asarray(batch["segments"]), np.asarray(batch["branches"])
    given = {"arch": ARCH, "compute": Compute(jnp.float32, "reference"), "terms": (("simpo", 1.0),), "chunk": 16}
    norms = packed.pair_weights(batch)
    assert norms["sequence"] == ((segments > 0) & (branches < 2)).sum()
    assert norms["completion"] == sum(len(pair(seed)[1]) for seed in SEEDS)
    value = lambda **more: jax.jit(  # noqa: E731
        lambda p: pairwise.pair_loss(p, batch, norms, **given, constants={"beta": 2.0}, **more)[0]
    )(policy)
    rows = [(prompt, side) for prompt, *both in map(pair, SEEDS) for side in both]
    means, squares = (
        np.asarray(x).reshape(-1, 2) for x in jax.jit(lambda p: totals(p, rows, jnp.float32, True))(policy)
    )
    weights = np.exp(means - squares).prod(1)
    losses = np.log1p(np.exp(-(2.0 * (means[:, 0] - means[:, 1]) - 0.5)))
    np.testing.assert_allclose(value(), losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(value(use_weighting=True), (weights * losses).mean(), rtol=1e-5)


def test_histograms_and_drift():
    _, policy = policies(np.float32)
    recipe = make_recipe(OBJECTIVE, ARCH, Compute(jnp.float32, "reference"))
    batch = {name: jnp.asarray(column) for name, column in batch_of().items()}
    whole, _ = with_columns(recipe.columns, *split(policy, lambda _: True), {}, batch, 1)
    _, metrics = recipe.loss(policy, whole, denominators(recipe.weights, whole))
    pairs, real = packed.pairs_of(whole["ref_logprobs"], whole), np.asarray(packed.pair_mask(whole))
    assert float(metrics["kl"][0]) > 0
    for name in ("chosen", "rejected"):
        counts, total = metrics[f"rewards/{name}_histogram"]
        assert counts.sum() == total == real.sum() == len(SEEDS)
        mean = float(metrics[f"rewards/{name}"][0] / total)
        low = np.asarray([-40.0, *packed.EDGES]) @ np.asarray(counts) / float(total)
        high = np.asarray([*packed.EDGES, 40.0]) @ np.asarray(counts) / float(total)
        assert low <= mean <= high
    ref = {**whole, "ref_logprobs": whole["ref_logprobs"]}
    same = packed.drift(whole["ref_logprobs"], ref, whole["weights"])["kl"][0]
    assert float(same) == 0
    assert pairs.margin[real].tolist() == [0.0] * len(SEEDS)


def test_falling_log_probs_are_said_once(run_of, capsys, monkeypatch):
    monkeypatch.setattr("train.loop.PATIENCE", 2)
    monkeypatch.setattr("train.recipes.BOTH_FELL", replace(BOTH_FELL, above=-1.0))
    run_of("falls", *LORA, "train.steps=6")
    assert capsys.readouterr().err.count("rewards/both_fell is above") == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("objective.reference=none",), "sigmoid compares with a reference"),
        (("objective.reference=adapterless",), "adapterless and tune.method is full"),
        (("objective.loss_weights=[1,2]",), "loss_weights has 2 numbers"),
        (("objective.loss_type=[exo_pair]", "objective.label_smoothing=0"), "exo_pair needs it above 0"),
        (("objective.beta=0",), "beta"),
        (("objective.loss_type=[nothing]",), "loss_type"),
    ],
)
def test_contradictions_are_refused(more, words):
    with pytest.raises(UsageError, match=words):
        load("dpo", ["model.source=x", "data.train=y", *more])


def test_the_schema_knows_every_loss():
    from configs.objective import LOSS_TYPES, NEEDS_NO_REFERENCE
    from train.losses.preference import LOSSES

    assert set(LOSS_TYPES["dpo"]) == {name for name, row in LOSSES.items() if row.paired}
    assert set(LOSS_TYPES["kto"]) == {name for name, row in LOSSES.items() if not row.paired}
    assert set(NEEDS_NO_REFERENCE) == {name for name, row in LOSSES.items() if not row.reference}

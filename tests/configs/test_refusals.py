"""Bad recipes: one clear sentence that says what, where, what is allowed, and what was probably meant."""

import pytest

from configs.errors import UsageError
from configs.load import load, shipped

SMALLEST = "model: {source: m}\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SMALLEST)
    return path


def refusal(path, overrides=()) -> str:
    with pytest.raises(UsageError) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("optim:\n  learning_rte: 1\n", 4, ["'optim.learning_rte'", "'optim.learning_rate'"]),
        ("optim:\n  lr: 1\n", 4, ["'optim.lr'", "'optim.learning_rate'"]),
        ("per_device_train_batch_size: 1\n", 3, ["'train.batch_size'"]),
        ("learning_rate: 1\n", 3, ["'optim.learning_rate'"]),
        ("trian: {steps: 1}\n", 3, ["'trian.steps'", "'train.steps'"]),
        ("optim.b1: 0.5\n", 3, ["'optim.b1'", "nested"]),
        ("zzz: 1\n", 3, ["'zzz'", "known: base, output, model"]),
        ("optim:\n  zzz: 1\n", 4, ["'optim.zzz'", "known in optim: name"]),
        ("optim: 3\n", 3, ["'optim' is a section", "given 3"]),
        ("optim:\n  b1: 0.5\n  b1: 0.6\n", 5, ["'optim.b1' is given twice", "line 4"]),
        ("optim:\n  learning_rate: -1\n", 4, ["optim.learning_rate is -1", "above 0", "direction"]),
        ("optim:\n  learning_rate: '1'\n", 4, ["optim.learning_rate is '1'", "remove the quotes"]),
        ("optim:\n  b1: 1\n", 4, ["at least 0 and below 1", "forget"]),
        ("train:\n  steps: 2.5\n", 4, ["train.steps is 2.5", "a whole number, at least 1, or null"]),
        ("data2: {}\n", 3, ["'data'"]),
        ("tune: {method: laura}\n", 3, ["full or lora", "did you mean lora?"]),
        ("mesh: {rules: {embed: fsd}}\n", 3, ["mesh.rules", "fsdp"]),
        ("log: {tensorboard: yes}\n", 3, ["log.tensorboard is 'yes'", "true or false"]),
        ("optim: [\n", 4, ["not valid YAML"]),
        ("log: &a {x: *a}\n", 3, ["contains itself"]),
        ("log: {every: !!python/name:os.system x}\n", 3, ["tag"]),
        ("[a]: 3\n", 3, ["plain name"]),
        ("base: nowhere.yaml\n", 3, ["'nowhere.yaml' does not exist", "shipped recipes: "]),
        ("base: 3\n", 3, ["base is 3"]),
    ],
)
def test_in_a_file(recipe, text, line, words):
    recipe.write_text(SMALLEST + text)
    message = refusal(recipe)
    assert message.startswith(f"{recipe}:{line}: "), message
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=1", ["'optim.learning_rate'"]),
        ("optim.b1", ["key=value"]),
        ("=3", ["key=value"]),
        ("optim=3", ["'optim' is a section"]),
        ("base=x", ["said in a recipe"]),
        ("optim.b1=[1", ["not valid YAML", "'optim.b1=[1'"]),
        ("optim.b1={x: 1}", ["optim.b1 is {x: 1}"]),
        ("optim.b1.x=1", ["optim.b1 is {x: 1}"]),
        ("optim.b1=.nan", ["optim.b1 is .nan"]),
        ("data.seed=" + "9" * 5000, ["not a number"]),
        ("data.train=" + "[" * 3000, ["nested too deeply"]),
        ("data.train_on=[asistant]", ["did you mean assistant?"]),
        ("export.max_shard_size=5", ["a number and KB, MB or GB"]),
        ("model.source=3", ["model.source is 3", "text"]),
    ],
)
def test_on_the_command_line(recipe, override, words):
    message = refusal(recipe, [override])
    assert message.startswith("command line: "), message
    for word in words:
        assert word in message, message


def test_no_data(recipe):
    assert refusal(recipe, ["data.train=[]"]).startswith("data.train is missing, files to train on")


def test_a_relation_names_both_places(recipe):
    recipe.write_text(SMALLEST + "train:\n  batch_size: 4\n")
    message = refusal(recipe, ["train.microbatches=3"])
    assert "does not divide train.batch_size 4" in message
    assert f"(command line, {recipe}:4)" in message


def test_missing_knobs_are_described(recipe):
    recipe.write_text("optim: {b1: 2}\n")
    lines = refusal(recipe).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("model.source is missing (hub id")
    assert lines[1].startswith("data.train is missing")
    assert "optim.b1 is 2" in lines[2]


def test_recipe_that_does_not_exist(tmp_path, recipe):
    assert "nearest is 'quickstart'" in refusal("quikstart")
    assert f"nearest is '{recipe}'" in refusal(tmp_path / "mien.yaml")
    message = refusal(tmp_path)
    assert "is a folder without config.yaml" in message
    assert f"shipped recipes: {', '.join(sorted(shipped()))}" in message


def test_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "circle" in refusal(tmp_path / "a.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"- 1\n", b"a: 1\n---\nb: 1\n", b"a: \x01", b"3"])
def test_files_that_are_no_recipe(recipe, content):
    recipe.write_bytes(content)
    assert refusal(recipe).startswith(str(recipe))


GRPO = "objective.type=grpo"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.loss_type=[dapo, grpo]"], "takes one loss"),
        (["objective.loss_type=sigmoid"], "objective.type is grpo, objective.loss_type sigmoid"),
        (["objective.loss_type=cispo"], "objective.epsilon_high is null.*the greatest ratio itself"),
        (["objective.epsilon=1.5"], "above 0 and at most 1"),
        (["objective.delta=1.2"], "must be above 1 \\+ objective.epsilon_high = 1.2"),
        (["objective.delta=4", "objective.loss_type=sapo"], "objective.delta is for the losses dapo"),
        (["objective.loss_type=luspo"], "set importance_sampling_level=sequence"),
        (["objective.loss_type=vespo", "objective.importance_sampling_level=sequence"], "leave it at token"),
        (["objective.loss_type=vespo", "objective.importance_sampling_correction=sequence_mask"], "token_truncate"),
        (["objective.importance_sampling_clip_min=4"], "nothing lies between"),
        (["objective.kl_in_reward=true"], "give a beta"),
        (
            ["objective.beta=0.1", "objective.kl_estimator=k1", "objective.use_bias_correction_kl=false"],
            "0 on average",
        ),
        (["objective.normalize_advantages=true"], "objective.advantage is group, which has a scale"),
        (
            ["objective.advantage=rloo", "objective.multi_objective_aggregation=normalize_then_sum"],
            "for advantage=group only",
        ),
        (
            ["objective.reward_clip_range=[0,1]", "objective.multi_objective_aggregation=normalize_then_sum"],
            "have no sum to change",
        ),
        (["objective.reward_clip_range=[1,0]"], "the least and the greatest"),
        (["objective.beta=0.1", "objective.reference=none"], "reference is none"),
        (["sample.num_generations=1", "sample.keep=all"], "compared with others of its prompt"),
        (
            [f"sample.{one}" for one in ("num_generations=1", "keep=all", "temperature=0")]
            + ["objective.advantage=reinforce"],
            "explore nothing",
        ),
        (["adv_estimator=rloo"], "'objective.advantage'"),
    ],
)  # fmt: skip
def test_learning_by_reward(recipe, overrides, words):
    with pytest.raises(UsageError, match=words):
        load(recipe, [GRPO, *overrides])


def test_learning_by_reward_has_defaults_of_its_own(recipe):
    made = load(recipe, [GRPO]).objective
    assert (made.loss_type, made.beta, made.needs_reference) == (("dapo",), 0.0, False)
    assert load(recipe, [GRPO, "objective.beta=0.04"]).objective.needs_reference
    assert load(recipe, ["objective.type=dpo"]).objective.beta == 0.1

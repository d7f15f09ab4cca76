"""The tiny model and its data, made once; runs of it in this process and in others."""

import pytest

from tests.train import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random Llama of two layers with a chat tokenizer, as a Hugging Face folder."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """60 short conversations."""
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.make_chats(60))


@pytest.fixture
def make_run(tmp_path, tiny_model, chats):
    """make_run(*overrides, output='run') -> the Run of a short training."""
    from configs.load import load

    def make(*more, output="run", model=tiny_model, data=chats, recipe="sft"):
        return load(recipe, tiny.overrides(tmp_path / output, model, data, *more))

    return make


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder where the processes that tests start share what they have compiled."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture
def start(compiled):
    """start(*arguments, devices=1, **environment) -> tiny.launch(...), ended with the test."""
    begun = []

    def begin(*arguments, **options):
        begun.append(tiny.launch(compiled, arguments, **options))
        return begun[-1]

    yield begin
    for process in begun:
        if process.returncode is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def sampling_settings(tmp_path_factory, tiny_model):
    """Overrides for sampling two answers of six tokens to ten questions; a reward in a file: the share of letters."""
    folder = tmp_path_factory.mktemp("sampling")
    rows = [{"prompt": chat["messages"][:1], "number": i} for i, chat in enumerate(tiny.make_chats(10))]
    (folder / "small.py").write_text(
        "def letters(prompts, completions, number, **columns):\n"
        "    texts = [one[0]['content'] for one in completions]\n"
        "    return [sum(x.islower() for x in text) / max(1, len(text)) for text in texts]\n"
    )
    rows = tiny.write_rows(folder / "prompts.jsonl", rows)
    sampling = ("num_generations=2", "max_new_tokens=6", "batch_size=4", f"reward={folder / 'small.py'}:letters")
    return [*tiny.overrides(folder, tiny_model, rows)[1:], *(f"sample.{one}" for one in sampling)]

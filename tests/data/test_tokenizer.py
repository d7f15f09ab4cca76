"""Both kinds of tokenizer files behind the same interface."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configs.errors import UsageError
from data.tokenizer import load_tokenizer, wrap_fast

SAMPLES = ["Hello  world\n\n12345", " lead and trail ", "中文 😀 naïve", "", "<s>a</s> b", "\t\n \n"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A folder with a sentencepiece model trained on the spot."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    text = folder / "text.txt"
    text.write_text(
        "hello world, what is your name?\nI am Kiln the helper of worlds\n你好世界\n" * 20, encoding="utf-8"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=330, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"330": {"content": "<|end|>"}}, "chat_template": "{{ messages }}"})
    )
    return folder


def test_fast_round_trip(tokenizer_with, tmp_path):
    tokenizer = tokenizer_with("llama3")
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 1]}))
    again = load_tokenizer(tmp_path)
    for text in SAMPLES:
        assert again.encode(text) == tokenizer.encode(text) == tokenizer.source.encode(text, add_special_tokens=False)
        assert again.decode(again.encode(text)) == text
    assert again.render([{"role": "user", "content": "x"}], True) == tokenizer.render(
        [{"role": "user", "content": "x"}], True
    )
    assert again.eos_ids == (1, 4)
    assert (again.bos_id, again.pad_id, again.vocab_size) == (0, 2, tokenizer.vocab_size)


def test_a_loaded_folder_is_saved_as_it_was(tokenizer_with, tmp_path):
    from transformers import AutoTokenizer

    tokenizer_with("chatml").save(tmp_path / "one")
    loaded = load_tokenizer(tmp_path / "one")
    loaded.with_chat_template("{{ 'other\n' }}").save(tmp_path / "two")
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "two", local_files_only=True)
    assert theirs.chat_template == "{{ 'other\n' }}"
    assert all(theirs.encode(text, add_special_tokens=False) == loaded.encode(text) for text in SAMPLES)


def test_offsets_cover_the_spaces(tokenizer_with):
    """Published byte-level files trim them; a mask would lose the spaces of a trained turn."""
    tokenizer = tokenizer_with("chatml")
    for text in SAMPLES:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert {at for start, end in offsets for at in range(start, end)} == set(range(len(text)))


def test_specials_around_plain_text(backend):
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = wrap_fast(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    plain = tokenizer.encode("hello")
    assert tokenizer.encode("hello", special=True) == [0, *plain, 1]
    assert tokenizer.encode("", special=True) == [0, 1]
    assert tokenizer.decode([0, *plain, 1], skip_special=True) == "hello"
    assert tokenizer.decode([0, *plain, 1]) == "<s>hello</s>"


def test_padding_and_truncation_in_the_file_do_nothing(backend):
    backend.enable_padding(length=20)
    backend.enable_truncation(3)
    assert len(wrap_fast(backend, {"eos_token": "</s>"}).encode("hello world what")) not in (3, 20)


def test_ids_beyond_the_vocabulary_are_visible(backend):
    tokenizer = wrap_fast(backend, {"eos_token": "</s>"})
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size, *tokenizer.encode("b")]) == "a\ufffdb"


def test_templates_by_name(backend):
    templates = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    tokenizer = wrap_fast(
        backend, {"eos_token": "</s>", "chat_template": {t["name"]: t["template"] for t in templates}}
    )
    assert tokenizer.render([{"role": "user", "content": "x"}]) == "D"
    assert tokenizer.render([{"role": "user", "content": "x"}], tools=[{"type": "function"}]) == "T"


def test_no_template_says_what_to_do(backend, tmp_path):
    tokenizer = wrap_fast(backend, {"eos_token": "</s>"})
    with pytest.raises(UsageError, match=r"no chat template.*data\.chat_template"):
        tokenizer.render([{"role": "user", "content": "x"}])
    with pytest.raises(UsageError, match="neither jinja text nor an existing file"):
        tokenizer.with_chat_template("missing.jinja")
    with pytest.raises(UsageError, match="not valid jinja"):
        tokenizer.with_chat_template("{% for %}").render([{"role": "user", "content": "x"}])
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    assert tokenizer.with_chat_template(str(tmp_path / "t.jinja")).render([{"role": "user", "content": "x"}]) == "x!"


def test_bad_folders(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("no model")
    with pytest.raises(UsageError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be read"):
        load_tokenizer(tmp_path)


TEXT = st.text(st.sampled_from(list("helo wrd 你世😀\n.")), max_size=30)


@hypothesis_settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_pieces_equal_sentencepiece(pieces, text):
    import sentencepiece

    tokenizer = load_tokenizer(pieces)
    ids, offsets = tokenizer.encode_with_offsets(text)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    assert ids == reference.encode(text)
    assert all(start <= end <= len(text) for start, end in offsets)
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
    assert tokenizer.decode(ids) == reference.decode(ids)


def test_pieces_with_special_tokens(pieces, tmp_path):
    tokenizer = load_tokenizer(pieces)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 331)
    ids, offsets = tokenizer.encode_with_offsets("<s>hello<|end|> world</s>")
    assert ids == [1, *tokenizer.encode("hello"), 330, *tokenizer.encode(" world"), 2]
    assert offsets[0] == (0, 3)
    assert offsets[-1] == (21, 25)
    assert tokenizer.encode("hello", special=True) == [1, *tokenizer.encode("hello")]
    assert tokenizer.decode([1, *tokenizer.encode("hello"), 330]) == "<s>hello<|end|>"
    assert tokenizer.decode([1, *tokenizer.encode("hello"), 330], skip_special=True) == "hello"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("hello <|end|>") == tokenizer.encode("hello <|end|>")


def test_the_pytorch_notice_is_silent_and_the_environment_untouched():
    code = (
        "import os; before = dict(os.environ)\n"
        "from data.tokenizer import import_transformers; import_transformers()\n"
        "assert dict(os.environ) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PyTorch" not in done.stderr


def test_importing_data_is_light():
    code = (
        "import sys, data.show, data.stats\n"
        "heavy = {'jax', 'transformers', 'grain', 'pyarrow', 'torch', 'tokenizers', 'sentencepiece'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

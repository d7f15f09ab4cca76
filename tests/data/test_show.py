"""What people see of a batch."""

import io

from rich.console import Console

from data.examples import Examples
from data.loader import Loader
from data.show import render_row, show_batch, show_data, trained_share, trained_texts, trained_tokens
from data.stats import summarise
from tests.data.test_chat import talk


def make(tokenizer_with, settings):
    rows = [{"messages": talk("Hello", "I am [bold]Kiln[/bold]")}, {"messages": talk("你好", "世界")}]
    data = settings(max_length=64, shuffle=False)
    return Loader(Examples(rows, tokenizer_with("chatml"), data), data, 2, epochs=1)


def test_plain(tokenizer_with, settings):
    loader = make(tokenizer_with, settings)
    out = io.StringIO()
    show_data(loader, Console(file=out, width=40), summary=summarise(loader))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\u27e6I am [bold]Kiln[/bold]<|im_end|>\u27e7" in text
    assert "<|im_start|>user\n你好<|im_end|>" in text
    assert "\u27e6世界<|im_end|>\u27e7" in text
    assert "2 examples of 2 rows" in text


def test_colour(tokenizer_with, settings):
    loader = make(tokenizer_with, settings)
    out = io.StringIO()
    show_data(loader, Console(file=out, force_terminal=True, color_system="standard", width=200))
    assert "\x1b[1;32m\u27e6世界<|im_end|>\u27e7" in out.getvalue()
    assert "\x1b[36m你好" in out.getvalue()


def test_branches(tokenizer_with, settings):
    rows = [{"prompt": "the quick", "chosen": " brown fox", "rejected": " dog"}]
    data = settings(max_length=64, shuffle=False)
    for kind, names in {"pair": ("chosen", "rejected"), "unpaired_plain": ("desirable", "undesirable")}.items():
        loader = Loader(Examples(rows, tokenizer_with("chatml"), data, kind), data, 1, epochs=1)
        out = io.StringIO()
        show_data(loader, Console(file=out, width=40))
        for name, answer in zip(names, (" brown fox", " dog"), strict=True):
            assert f"\u2500\u2500 {name} \u2500\u2500\n\u27e6{answer}<|im_end|>\u27e7" in out.getvalue()
        row = {name: column[0] for name, column in next(loader).items()}
        assert trained_texts(row, loader.examples.tokenizer) == [" brown fox<|im_end|>", " dog<|im_end|>"]


def test_batch(tokenizer_with, settings):
    loader = make(tokenizer_with, settings)
    tokenizer = loader.examples.tokenizer
    batch = next(loader)
    row = {name: column[0] for name, column in batch.items()}
    texts = [text for number in range(2) for text in trained_texts({k: c[number] for k, c in batch.items()}, tokenizer)]
    assert sorted(texts) == ["I am [bold]Kiln[/bold]<|im_end|>", "世界<|im_end|>"]
    assert tokenizer.eos_ids[0] in trained_tokens(batch)
    assert 0.1 < trained_share(batch) < 0.6
    assert "example 1" in render_row(row, tokenizer).plain
    out = io.StringIO()
    show_batch(batch, tokenizer, Console(file=out, width=60))
    assert "of the tokens carry loss" in out.getvalue()

"""The table of weights: shapes against the model's own declaration, both directions, and what does not match."""

import itertools

import numpy as np
import pytest

from configs.errors import UsageError
from convert.load import load_params, resolve
from convert.tables import rows
from model.architecture import Architecture
from model.transformer import declare

SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 36,
    "max_position": 64,
    "family": "gemma3_text",  # which has names for all of these
}
SWITCHES = ("tie_embeddings", "attention_bias", "output_bias", "mlp_bias", "qk_norm", "post_norms")


@pytest.mark.parametrize("on", [(), SWITCHES, *itertools.combinations(SWITCHES, 1)], ids=str)
def test_shapes_are_those_the_model_declares(on):
    arch = Architecture(**SIZES, **dict.fromkeys(on, True))
    assert {row.ours: row.shape(arch) for row in rows(arch)} == {p: d.shape for p, d in declare(arch).items()}


def test_every_row_goes_back_and_forth():
    arch = Architecture(**SIZES, num_labels=2, **dict.fromkeys(SWITCHES, True))
    for row in rows(arch):
        theirs = np.arange(np.prod(row.their_shape(arch))).reshape(row.their_shape(arch))
        ours = row.to_ours(theirs, arch)
        assert ours.shape == row.layer_shape(arch)
        assert np.shares_memory(ours, theirs)
        np.testing.assert_array_equal(row.to_theirs(ours, arch), theirs)


def test_products_are_those_of_torch_linear():
    arch = Architecture(**SIZES | {"family": "llama"})
    table, rng = {row.ours: row for row in rows(arch)}, np.random.default_rng(0)

    def weight(path):
        theirs = rng.standard_normal(table[path].their_shape(arch))
        return theirs, table[path].to_ours(theirs, arch)

    theirs, ours = weight("layers/attn/q/weight")
    x = rng.standard_normal((5, 24))
    np.testing.assert_allclose(np.einsum("td,dnh->tnh", x, ours), (x @ theirs.T).reshape(5, 6, 8))
    theirs, ours = weight("layers/attn/o/weight")
    x = rng.standard_normal((5, 6, 8))
    np.testing.assert_allclose(np.einsum("tnh,nhd->td", x, ours), x.reshape(5, 48) @ theirs.T)
    theirs, ours = weight("head/weight")
    x = rng.standard_normal((5, 24))
    np.testing.assert_allclose(x @ ours, x @ theirs.T)


def test_missing_and_surplus_tensors_are_listed(tiny):
    folder, _ = tiny(
        drop=["model.layers.1.mlp.up_proj.weight", "model.norm.weight"],
        add={"model.layers.0.extra.weight": np.zeros(3, np.float32)},
    )
    with pytest.raises(UsageError) as error:
        load_params(resolve(folder))
    for part in ("2 missing", "layers.1.mlp.up_proj.weight", "model.norm.weight", "layers.0.extra.weight", str(folder)):
        assert part in str(error.value)


def test_a_long_list_is_cut(tiny):
    folder, _ = tiny(drop=[f"model.layers.{i}.{n}.weight" for i in range(3) for n in ("mlp.up_proj", "mlp.gate_proj",
                                                                                     "mlp.down_proj")])  # fmt: skip
    with pytest.raises(UsageError, match=r"9 missing: .* and 1 more"):
        load_params(resolve(folder))


def test_wrong_shape_and_integer_weights(tiny):
    folder, _ = tiny("shape", add={"model.norm.weight": np.zeros(25, np.float32)})
    with pytest.raises(UsageError, match=r"model.norm.weight \[25\] instead of \[24\]"):
        load_params(resolve(folder))
    folder, _ = tiny("integer", add={"model.norm.weight": np.zeros(24, np.int8)})
    with pytest.raises(UsageError, match=r"model\.norm\.weight is I8"):
        load_params(resolve(folder))


def test_rotary_buffers_are_ignored(tiny):
    folder, _ = tiny(add={"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)})
    load_params(resolve(folder))


def test_tied_head_written_out_must_equal_the_embedding(tiny, tiny_tensors):
    _, tensors = tiny("base")
    folder, _ = tiny("same", add={"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert "head" not in load_params(resolve(folder))
    folder, _ = tiny("other", add={"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(UsageError, match="tie_word_embeddings"):
        load_params(resolve(folder))


def test_untied_head_must_be_there(tiny):
    folder, _ = tiny(drop=["lm_head.weight"], tie_word_embeddings=False)
    with pytest.raises(UsageError, match=r"1 missing: lm_head.weight"):
        load_params(resolve(folder))

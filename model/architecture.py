"""The numbers that define a transformer: what a Hugging Face config.json boils down to."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864): base, what is rotated, and how frequencies are scaled."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0  # how far the context is stretched
    low_freq_factor: float = 1.0  # llama3 only, as the next one
    high_freq_factor: float = 4.0
    original_max_position: int = 8192  # all but linear: the context before it was stretched
    fraction: float = 1.0  # of a head's numbers, the first of them, that are rotated
    interleaved: bool = False  # the pairs are neighbours, not halves of what is rotated
    attention_factor: float = 1.0  # multiplies cos and sin
    beta_fast: float = 32.0  # yarn only, as the next two
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope only: divisors of the frequencies,
    long_factors: tuple[float, ...] = ()  # and for sequences longer than original_max_position

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long a sequence is."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. Hashable, so that a jitted function may close over it."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_position: int
    rope: Rope = Rope()
    family: str = "llama"  # the model_type whose names a checkpoint and a config.json of it have
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_offset: float = 0.0  # a norm multiplies by offset + scale: the tree keeps the checkpoint's own values
    pre_norms: bool = True  # norm what attention and MLP read
    post_norms: bool = False  # norm what attention and MLP add to the residual stream
    # parallel: both read the same residual stream, by a norm each or by one that they share; post: the stream itself is
    # normed behind each
    block: Literal["sequential", "parallel", "parallel_shared", "post"] = "sequential"
    residual_scale: float = 1.0  # multiplies what attention and MLP add to the residual stream
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True  # down(activation(gate) * up); else down(activation(up))
    tie_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False  # q and k are normed, before RoPE:
    qk_norm_over: Literal["head", "heads", "width"] = "head"  # each head by one scale, or by its own; all together
    query_pre_attn_scalar: float | None = None  # scores are q k / sqrt(this); None: the head dimension
    attention_multiplier: float | None = None  # or: scores are q k times this
    attention_softcap: float | None = None  # c: scores become c tanh(scores / c)
    windows: tuple[int, ...] = ()  # a layer sees that many of the latest positions, its own too; 0: all; (): all do
    local_rope: Rope | None = None  # of the layers with a window, where theirs is another
    rotated: tuple[bool, ...] = ()  # whether a layer uses RoPE; (): all do
    learned_positions: bool = False  # a table of them is added to the embeddings, in place of RoPE
    embed_scale: float = 1.0  # multiplies the embeddings, rounded to their dtype
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # c: logits become c tanh(logits / c)
    init_std: float = 0.02
    causal: bool = True  # False: an encoder (model/encoder.py)
    token_types: int = 0  # an encoder's, of segments of its text
    # a reward model: a score head in place of the language model's
    num_labels: int = 0  # scores; several of a sequence are an ensemble. 0: a language model
    token_labels: bool = False  # each token is scored, as bad or good (two labels), for the steps that end in it

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        for rope in (self.rope, self.local_rope or self.rope):
            turned = int(self.head_dim * rope.fraction)
            if turned % 2 and not self.learned_positions:
                raise ValueError(f"RoPE rotates pairs: not {turned} numbers of a head (head_dim {self.head_dim})")
            if rope.kind == "longrope" and {len(rope.short_factors), len(rope.long_factors)} != {turned // 2}:
                raise ValueError(f"longrope needs {turned // 2} short and as many long factors")
        for what, given in (("windows", self.windows), ("rotated", self.rotated)):
            if len(given) not in (0, self.num_layers):
                raise ValueError(f"{len(given)} {what} for {self.num_layers} layers")
        if self.token_labels and self.num_labels != 2:
            raise ValueError(f"num_labels is {self.num_labels}: labels of tokens are two, bad and good")

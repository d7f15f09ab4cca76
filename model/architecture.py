"""The numbers that define a transformer: what a Hugging Face config.json boils down to."""

from dataclasses import dataclass, replace
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
class Experts:
    """A mixture of experts in place of a layer's MLP (model/moe.py)."""

    count: int
    top_k: int  # of them for each token
    d_ff: int  # of each
    scores: Literal["softmax", "sigmoid", "chosen"] = "softmax"  # chosen: softmax over the chosen ones' logits alone
    normalise: bool = True  # the chosen ones' weights add up to 1
    scale: float = 1.0  # then multiplied by this
    correction: bool = False  # each expert has a bias that counts for choosing only
    groups: int = 1  # of neighbouring experts, of which the best are candidates:
    groups_kept: int = 1
    group_best: int = 2  # a group is as good as the sum of so many of its best scores
    router_bias: bool = False
    bias: bool = False  # on all three matrices of an expert
    glu: tuple[float, float] | None = None  # gpt-oss's clipped SwiGLU: (alpha, limit)
    shared_d_ff: int = 0  # an MLP of this size that sees every token beside the experts
    shared_gate: bool = False  # weighed by a sigmoid of its own
    aux_loss_coef: float = 0.0  # of the load-balance loss, when nothing else is asked for

    def __post_init__(self) -> None:
        if self.count % self.groups:
            raise ValueError(f"{self.count} experts in {self.groups} groups: not a multiple")
        if not 0 < self.groups_kept <= self.groups:
            raise ValueError(f"{self.groups_kept} of {self.groups} groups of experts")
        candidates = self.groups_kept * self.count // self.groups
        if not 0 < self.top_k <= candidates:
            raise ValueError(f"{self.top_k} experts for each token of {candidates} candidates")


@dataclass(frozen=True)
class Latent:
    """Attention whose keys and values are made of a short vector a token (model/mla.py)."""

    rank: int  # of that vector
    rope_dim: int  # of the head_dim numbers of q and k, those at the end, which alone are rotated
    value_dim: int  # of a head
    q_rank: int | None = None  # q is made of a short vector too, of this size


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
    latent: Latent | None = None
    sinks: bool = False  # a head has the score of one more key, whose value is 0
    # a mixture of experts
    experts: Experts | None = None
    dense_layers: int = 0  # the first so many layers have an MLP (of d_ff) all the same
    # a reward model: a score head in place of the language model's
    num_labels: int = 0  # scores; several of a sequence are an ensemble. 0: a language model
    token_labels: bool = False  # each token is scored, as bad or good (two labels), for the steps that end in it

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        for rope in (self.rope, self.local_rope or self.rope):
            turned = int((self.latent.rope_dim if self.latent else self.head_dim) * rope.fraction)
            if turned % 2 and not self.learned_positions:
                raise ValueError(f"RoPE rotates pairs: not {turned} numbers of a head (head_dim {self.head_dim})")
            if rope.kind == "longrope" and {len(rope.short_factors), len(rope.long_factors)} != {turned // 2}:
                raise ValueError(f"longrope needs {turned // 2} short and as many long factors")
        for what, given in (("windows", self.windows), ("rotated", self.rotated)):
            if len(given) not in (0, self.num_layers):
                raise ValueError(f"{len(given)} {what} for {self.num_layers} layers")
        if not 0 <= self.dense_layers < self.num_layers or (self.dense_layers and self.experts is None):
            raise ValueError(f"{self.dense_layers} of {self.num_layers} layers are dense, experts {self.experts}")
        if self.token_labels and self.num_labels != 2:
            raise ValueError(f"num_labels is {self.num_labels}: labels of tokens are two, bad and good")

    @property
    def groups(self) -> dict[str, range]:
        """{their name in the parameter tree: which layers} of the groups of like layers, from the first one on."""
        dense = {"dense_layers": range(self.dense_layers)} if self.dense_layers else {}
        return {**dense, "layers": range(self.dense_layers, self.num_layers)}

    def of_group(self, name: str) -> "Architecture":
        """The same, if all layers were as those of this group are."""
        return replace(self, experts=None, dense_layers=0) if name == "dense_layers" else self

"""The numbers that define a transformer: what a Hugging Face config.json boils down to."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base and frequency scaling (RoFormer, arXiv 2104.09864; Llama 3.1's 'llama3')."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0  # linear and llama3: how far the context is stretched
    low_freq_factor: float = 1.0  # llama3 only, as the next two
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


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
    norm_eps: float = 1e-5
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True  # down(activation(gate) * up); else down(activation(up))
    tie_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False  # q and k are normed, before RoPE
    qk_norm_over: Literal["head", "heads", "width"] = "head"  # each head by one scale, or its own; all heads together
    init_std: float = 0.02
    learned_positions: bool = False  # a table of them is added to the embeddings, and there is no RoPE
    pre_norms: bool = True  # norm what attention and MLP read
    # parallel: both read the same residual stream, by a norm each or by one that they share
    block: Literal["sequential", "parallel", "parallel_shared"] = "sequential"
    residual_scale: float = 1.0  # multiplies what attention and MLP add to the residual stream
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # c tanh(logits / c)
    attention_softcap: float | None = None  # the same of the scores
    rotated: tuple[bool, ...] = ()  # whether a layer uses RoPE; (): all do
    # what Gemma adds
    norm_offset: float = 0.0  # a norm multiplies by offset + scale: the tree keeps the checkpoint's own values
    post_norms: bool = False  # also norm what attention and MLP add to the residual stream
    embed_scale: float = 1.0  # multiplies the embeddings, rounded to their dtype
    query_pre_attn_scalar: float | None = None  # scores are q k / sqrt(this); None: the head dimension
    windows: tuple[int, ...] = ()  # a layer sees that many of the latest positions, its own too; 0: all; (): all do
    local_rope: Rope | None = None  # of the layers with a window, where theirs is another
    # a reward model: a score head in place of the language model's
    num_labels: int = 0  # scores; several of a sequence are an ensemble. 0: a language model
    token_labels: bool = False  # each token is scored, as bad or good (two labels), for the steps that end in it

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")
        if len(self.windows) not in (0, self.num_layers):
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        if self.token_labels and self.num_labels != 2:
            raise ValueError(f"num_labels is {self.num_labels}: labels of tokens are two, bad and good")

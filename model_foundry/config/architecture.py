"""The section that describes a model to be made from nothing, in the names of a Hugging Face `config.json`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from model_foundry.config.section import NonNegativeInt, PositiveInt, Section, broken_rule

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class ArchitectureSection(Section):
    architecture: Literal["llama", "qwen3", "qwen3_moe", "gpt2"] = "llama"
    """llama, qwen3 (norms on queries and keys), qwen3_moe (experts for the MLP), or gpt2 (run by transformers)."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; default as many as the tokenizer has tokens."""
    max_position_embeddings: PositiveInt = 512
    """Context: the longest row in tokens."""
    num_hidden_layers: PositiveInt = 6
    """Layers."""
    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    intermediate_size: PositiveInt | None = None
    """Inner width of the MLP; default 8/3 of hidden_size up to a multiple of 64, four times hidden_size for gpt2."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads, each shared by as many query heads; default one for each query head."""
    head_dim: Annotated[int, Field(ge=2)] | None = None
    """Width of a head; default hidden_size / num_attention_heads."""
    hidden_act: Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] | None = None
    """Activation of the MLP; default silu, gelu_new for gpt2."""
    dropout: Rate = 0.0
    """Dropout on the embeddings and on what each block adds, in training; drawn by seed, step and row."""
    attention_dropout: Rate = 0.0
    """Dropout on attention probabilities in training; drawn by seed, step and row."""
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    """Epsilon of the norms."""
    tie_word_embeddings: bool = True
    """The output head is the embedding; false gives it weights of its own."""
    initializer_range: Annotated[float, Field(gt=0, lt=10)] = 0.02
    """Standard deviation of fresh weights; those that end a block are scaled by 1 / sqrt(2 layers) besides."""
    num_experts: PositiveInt | None = None
    """Experts of a layer; qwen3_moe needs it."""
    num_experts_per_tok: PositiveInt = 2
    """Experts that a token is sent to."""
    moe_intermediate_size: PositiveInt | None = None
    """Inner width of one expert; default intermediate_size / num_experts_per_tok."""
    norm_topk_prob: bool = True
    """Divide the chosen experts' weights by their sum."""
    decoder_sparse_step: PositiveInt = 1
    """Every so many layers one has experts."""
    mlp_only_layers: tuple[NonNegativeInt, ...] = ()
    """Layers, from 0, that keep a plain MLP all the same."""
    router_aux_loss_coef: Annotated[float, Field(ge=0, lt=100)] = 0.001
    """Factor of the load-balancing loss that is added in training; 0 leaves it out."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        self._check_heads()
        if self.architecture == "gpt2":
            self._check_gpt2()
        if self.architecture == "qwen3_moe":
            self._check_experts()
        elif self.num_experts is not None:
            raise broken_rule("num_experts", f"num_experts is for qwen3_moe, and architecture is {self.architecture}")
        return self

    def _check_heads(self) -> None:
        heads, keys = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads and (self.head_dim is None or self.architecture == "llama"):
            # transformers opens no Llama whose heads do not divide the width, whatever their own.
            what = f"num_attention_heads {heads} does not divide hidden_size {self.hidden_size}"
            raise broken_rule("num_attention_heads", what if self.head_dim else f"{what}, and head_dim is not given")
        if keys is not None and heads % keys:
            what = f"num_key_value_heads {keys} does not divide num_attention_heads {heads}"
            raise broken_rule("num_key_value_heads", what)
        width = self.hidden_size // heads if self.head_dim is None else self.head_dim
        if width % 2 and self.architecture != "gpt2":
            field = "num_attention_heads" if self.head_dim is None else "head_dim"
            raise broken_rule(field, f"a head of {width} is odd, and the rotary embedding turns pairs")

    def _check_gpt2(self) -> None:
        """GPT-2 has neither rotation nor shared heads, and transformers draws its dropout from hidden state."""
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise broken_rule("num_key_value_heads", "gpt2 has one key and value head for each query head")
        if self.head_dim is not None and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise broken_rule("head_dim", "gpt2 has heads of hidden_size / num_attention_heads")
        for field in ("dropout", "attention_dropout"):
            if getattr(self, field):
                what = "gpt2 runs through transformers, whose dropout cannot be repeated; set it to 0 or choose llama"
                raise broken_rule(field, what)

    def _check_experts(self) -> None:
        if self.num_experts is None:
            raise broken_rule("num_experts", "qwen3_moe needs num_experts")
        if self.num_experts_per_tok > self.num_experts:
            what = f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}"
            raise broken_rule("num_experts_per_tok", what)
        beyond = [layer for layer in self.mlp_only_layers if layer >= self.num_hidden_layers]
        if beyond:
            what = f"layer {beyond[0]} is not one of {self.num_hidden_layers} layers, counted from 0"
            raise broken_rule("mlp_only_layers", what)
        plain, step = set(self.mlp_only_layers), self.decoder_sparse_step
        if plain >= {layer for layer in range(self.num_hidden_layers) if (layer + 1) % step == 0}:
            # transformers, told to balance experts, ends with an error in a model that has none.
            field = "mlp_only_layers" if step <= self.num_hidden_layers else "decoder_sparse_step"
            raise broken_rule(field, f"none of the {self.num_hidden_layers} layers has experts; choose qwen3 for that")

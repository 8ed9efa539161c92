"""Peak memory of a training step, by part, from a model's shape and the longest batch. Arithmetic only: no tensors.

The terms follow what `decoder`, `lora`, `experts`, `attention` and `engine.losses` keep for the backward pass, one line
each, so that a change there is a change of one line here. On a CPU it is measured against the peak resident set of
fresh processes by tests/recipes; for other machines it is arithmetic that nobody has measured. It does not know the
transformers fallback.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from model_foundry.models.config import HEAD_LAYER, ModelConfig
from model_foundry.types import LoraConfig, OptimizerKind

QUERY_BLOCK_TOKENS = 256
KEEP_PROBABILITIES_TOKENS = 512
CHUNK_LOGITS = 12_500_000
"""The same constants as in `attention` and `engine.losses`; a test holds them together."""
MAX_OWN_GRADIENT_BYTES = 512 * 2**20
"""Where threads have rows of their own they have gradients of their own, all of them together no larger than this."""
PROCESS_BYTES = 235_000_000
"""Resident set of an interpreter that has imported torch and the engine, before a model is loaded."""
LIBRARY_BYTES = 130_000_000
"""What the first step brings in: kernels of torch and its libraries, and their buffers."""
HOLES_LAYERS = 6
"""Holes that glibc's heap keeps between freed tensors, in layers' worth of activations; 2 to 9 were measured. In layers
with experts the large tensors fill each other's places: there it is as if each token met one expert."""
FORWARD_LAYERS = 1.25
"""Layers' worth of activations in a pass without gradients: one at a time, and holes; two runs had 1.1 and 1.7."""
PACKING_BYTES = 135_000_000
"""What importing bitsandbytes brings in."""
FLOAT32_BYTES = 4
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a packed weight: four, a scale of eight bits for 64 weights, and one of 32 bits for 256 scales."""
ACCELERATOR_BYTES = 800_000_000
"""An accelerator's own context and the kernels loaded there."""
Machine = Literal["cpu", "accelerator"]
ROUTER, EXPERTS = "mlp.gate", "mlp.experts."


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak of a run: of a step, or of a measurement on held-out rows where those need more.

    Attributes:
        weights: base weights and adapters.
        gradients: of everything trained, float32.
        optimizer: AdamW's two moments, float32; with Muon one for the hidden matrices.
        activations: what the forward pass keeps for the backward pass, and the holes between its tensors; or what a
            pass without gradients, or a second model, holds.
        logits: the head's pieces, and the gradient it hands back.
        other: the interpreter, torch and its libraries; memory that loading needed and nothing else fills.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


def estimate_memory(
    config: ModelConfig,
    *,
    lora: LoraConfig | None,
    rows: Sequence[int],
    dtype_bytes: int = FLOAT32_BYTES,
    adapted: Collection[str] | None = None,
    num_due_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    process_bytes: int = PROCESS_BYTES,
    packed: bool = False,
    machine: Machine = "cpu",
    optimizer: OptimizerKind = "adamw",
    num_threads: int = 1,
    held_out_rows: Sequence[int] = (),
    sampled_rows: Sequence[int] = (),
    loaded_again: bool = False,
    keeps_probabilities: bool = True,
) -> MemoryEstimate:
    """Peak memory of one forward, backward and optimizer step, and of what is measured between steps.

    Args:
        lora: None trains every weight (kept in float32 whatever the compute type).
        rows: tokens of each row of the largest batch computed at once.
        dtype_bytes: of the compute type: 4 for float32, 2 for bfloat16.
        adapted: names out of `config.linear_kinds`, or the head's, that carry an adapter; default all but routers.
        num_due_tokens: tokens with a loss due; default all of them.
        process_bytes: resident set before the model is loaded, where the caller has measured it.
        packed: linear layers in four bits (nf4), under adapters only.
        num_threads: on a CPU, each has gradients of its own while it computes its rows, where they are not too large.
        held_out_rows: tokens of each row of the largest piece that is measured without gradients.
        sampled_rows: tokens of each sequence that is sampled at the same time, prompt and answer.
        loaded_again: at the end the saved weights are read into a second model beside the first.
        keeps_probabilities: on a CPU, attention's of short rows, as where no `tiled_attention` computes it.
        machine: `accelerator` is the memory of the device: fused attention, no holes of glibc's heap.
    """
    names = default_targets(config) if adapted is None else set(adapted)
    due = sum(rows) if num_due_tokens is None else num_due_tokens
    num_trained = config.num_parameters if lora is None else num_adapter_parameters(config, lora, adapted=names)
    base = base_bytes(config, dtype_bytes=FLOAT32_BYTES if lora is None else dtype_bytes, packed=packed)
    weights = base + (0 if lora is None else num_trained * FLOAT32_BYTES)
    keeps = keeps_probabilities and machine == "cpu"
    kept, holes = [], []
    for sparse in map(config.is_sparse, range(config.num_hidden_layers)):
        casts = _kept_casts(config, lora=lora, adapted=names, sparse=sparse, dtype_bytes=dtype_bytes)
        for found, one in ((kept, False), (holes, True)):
            elements = _kept_elements(
                config, rows, lora=lora, adapted=names, sparse=sparse, keeps_probabilities=keeps, one_expert=one
            )
            found.append(elements * dtype_bytes + casts)
    boundaries = config.num_hidden_layers * sum(rows) * config.hidden_size * dtype_bytes
    activations = boundaries + max(kept) if gradient_checkpointing else sum(kept)
    activations += HOLES_LAYERS * max(holes) if machine == "cpu" else max(kept)
    activations += 2 * _largest_matrix(config) * dtype_bytes if packed else 0
    logits = _head_bytes(config, due, trained=lora is None, dtype_bytes=dtype_bytes, machine=machine)
    held_out = _held_out_bytes(
        config, held_out_rows, lora=lora, adapted=names, machine=machine, dtype_bytes=dtype_bytes,
        keeps_probabilities=keeps,
    )  # fmt: skip
    sampled = _sampled_bytes(config, sampled_rows, dtype_bytes=dtype_bytes)
    again = base_bytes(config, dtype_bytes=dtype_bytes, packed=packed) if loaded_again else 0
    activations, logits = max((activations, logits), held_out, sampled, (again, 0), key=sum)
    num_moments = 2 * num_trained - (num_hidden_weights(config) if optimizer == "muon" else 0)
    moments = num_moments * FLOAT32_BYTES
    gradients = num_trained * FLOAT32_BYTES
    if machine == "cpu" and 1 < num_threads <= len(rows) and not (gradient_checkpointing or packed):
        gradients += _own_gradient_bytes(config, num_trained, lora=lora, num_threads=num_threads)
    fixed = weights + gradients + moments
    loading = fixed + (base if lora is None else 0)  # copied into one stretch; the first place is left to what comes
    libraries, process = (LIBRARY_BYTES, process_bytes) if machine == "cpu" else (0, ACCELERATOR_BYTES)
    libraries += PACKING_BYTES if packed and machine == "cpu" else 0
    step = fixed + activations + logits + libraries
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        activations=activations,
        logits=logits,
        other=process + libraries + max(0, loading - step),
    )


def base_bytes(config: ModelConfig, *, dtype_bytes: int, packed: bool = False) -> int:
    """Bytes of the base weights; packed ones are the linear layers but head and routers."""
    if not packed:
        return config.num_parameters * dtype_bytes
    in_four_bits = num_hidden_weights(config)
    return (config.num_parameters - in_four_bits) * dtype_bytes + round(in_four_bits * NF4_BITS / 8)


def num_hidden_weights(config: ModelConfig) -> int:
    """Weights of the linear layers but head and routers: what may be packed, and what Muon updates."""
    return sum(kind.num_weights for name, kind in config.linear_kinds.items() if name != ROUTER)


def default_targets(config: ModelConfig) -> set[str]:
    """The kinds of linear layers that `all-linear` adapts: all but routers."""
    return set(config.linear_kinds) - {ROUTER}


def num_adapter_parameters(config: ModelConfig, lora: LoraConfig, *, adapted: Collection[str] | None = None) -> int:
    """Parameters of A and B on the linear layers of the named kinds, and the head's, with DoRA's magnitudes."""
    names = default_targets(config) if adapted is None else adapted
    total = 0
    for name, kind in config.linear_kinds.items():
        if name in names:
            total += kind.count * (lora.r * (kind.num_out + kind.num_in) + (kind.num_out if lora.use_dora else 0))
    return total + (lora.r * (config.vocab_size + config.hidden_size) if HEAD_LAYER in names else 0)


def _in_layer(config: ModelConfig, *, sparse: bool) -> set[str]:
    """The kinds of linear layers in a layer with experts, or without."""
    mixed = {name for name in config.linear_kinds if name.startswith("mlp.")}
    experts = {name for name in mixed if name == ROUTER or name.startswith(EXPERTS)}
    return set(config.linear_kinds) - (mixed - experts if sparse else experts)


def _kept_elements(
    config: ModelConfig,
    rows: Sequence[int],
    *,
    lora: LoraConfig | None,
    adapted: Collection[str],
    sparse: bool,
    keeps_probabilities: bool,
    one_expert: bool,
) -> int:
    """Elements of the compute type that one layer keeps for its backward pass; `one_expert`: as if k were 1."""
    width = config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    experts = config.experts if sparse else None
    inner, times = config.intermediate_size, 1
    if experts is not None:
        inner, times = experts.moe_intermediate_size, 1 if one_expert else experts.num_experts_per_tok
    kinds = {name: config.linear_kinds[name] for name in _in_layer(config, sparse=sparse) & {*adapted}}
    uses = {name: times if name.startswith(EXPERTS) else 1 for name in kinds}
    per_token = {
        "residual before attention, read by the norm": width,
        "normed input of q, k, v": width,
        "rotated q and k, v": queries + 2 * keys,
        "q and k before their norms": queries + keys if config.qk_norm else 0,
        "attention's output, read by o": queries,
        "float32 logarithms of attention's sums": 0 if keeps_probabilities else 2 * config.num_attention_heads,
        "residual before the MLP, read by the norm": width,
        "normed input of gate and up, or of the router": width,
        "gate and up": 2 * times * inner,
        "their product, read by down": times * inner,
        "activation of gate, outside the fused SiLU": times * inner if config.hidden_act != "silu" else 0,
        "x A of each adapter": 0 if lora is None else sum(uses.values()) * lora.r,
        "DoRA's outputs before their gain": 0
        if lora is None or not lora.use_dora
        else sum(uses[name] * kind.num_out for name, kind in kinds.items()),
        "inputs of adapters after dropout": 0
        if lora is None or not lora.lora_dropout
        else sum(uses[name] * kind.num_in for name, kind in kinds.items()),
        "tokens sorted by expert, and the experts' outputs": 0 if experts is None else 2 * times * width,
        "float32 probabilities of the router": 0 if experts is None else 2 * experts.num_experts,
    }
    probabilities = sum(
        config.num_attention_heads * _scores(length, config.sliding_window)
        for length in rows
        if length <= KEEP_PROBABILITIES_TOKENS and keeps_probabilities
    )
    return sum(rows) * sum(per_token.values()) + probabilities


def _own_gradient_bytes(config: ModelConfig, num_trained: int, *, lora: LoraConfig | None, num_threads: int) -> int:
    """Gradients that threads hold while each computes rows of its own; 0 where they do not (see `engine.pieces`)."""
    if config.experts or config.dropout or config.attention_dropout or (lora is not None and lora.lora_dropout):
        return 0
    head = config.vocab_size * config.hidden_size if lora is None else 0
    own = (num_trained + head) * FLOAT32_BYTES * num_threads
    return own if own <= MAX_OWN_GRADIENT_BYTES else 0


def _held_out_bytes(
    config: ModelConfig,
    rows: Sequence[int],
    *,
    lora: LoraConfig | None,
    adapted: Collection[str],
    machine: Machine,
    dtype_bytes: int,
    keeps_probabilities: bool,
) -> tuple[int, int]:
    """Activations and logits of a pass that keeps nothing for a backward pass."""
    if not rows:
        return 0, 0
    layer = max(
        _kept_elements(
            config,
            rows,
            lora=lora,
            adapted=adapted,
            sparse=sparse,
            keeps_probabilities=keeps_probabilities,
            one_expert=False,
        )
        for sparse in {*map(config.is_sparse, range(config.num_hidden_layers))}
    )
    return round(FORWARD_LAYERS * layer * dtype_bytes), _head_bytes(
        config, sum(rows), trained=False, dtype_bytes=dtype_bytes, machine=machine
    )


def _sampled_bytes(config: ModelConfig, rows: Sequence[int], *, dtype_bytes: int) -> tuple[int, int]:
    """Keys and values of sequences filled up to the longest, and the logits of a step with their probabilities."""
    keys = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    return len(rows) * max(rows, default=0) * keys * dtype_bytes, 3 * len(rows) * config.vocab_size * FLOAT32_BYTES


def _kept_casts(
    config: ModelConfig, *, lora: LoraConfig | None, adapted: Collection[str], sparse: bool, dtype_bytes: int
) -> int:
    """Bytes of copies of trained weights that one layer keeps: scaled adapters, or linears in the compute type.

    Experts are cast one by one where they are used, and not kept.
    """
    kinds = config.linear_kinds
    names = [name for name in _in_layer(config, sparse=sparse) if not name.startswith(EXPERTS)]
    if lora is None:
        return 0 if dtype_bytes == FLOAT32_BYTES else dtype_bytes * sum(
            kinds[name].num_out * kinds[name].num_in for name in names
        )  # fmt: skip
    sizes = (kinds[name].num_out + kinds[name].num_in for name in names if name in adapted)
    magnitudes = sum(kinds[name].num_out for name in names if name in adapted) if lora.use_dora else 0
    return dtype_bytes * (lora.r * sum(sizes) + magnitudes)


def _largest_matrix(config: ModelConfig) -> int:
    return max(kind.num_out * kind.num_in for kind in config.linear_kinds.values())


def _scores(length: int, window: int | None) -> int:
    """Query-key pairs computed for one head of one row: blocks of queries, each with the keys up to its end."""
    pairs = 0
    for first in range(0, length, QUERY_BLOCK_TOKENS):
        last = min(first + QUERY_BLOCK_TOKENS, length)
        pairs += (last - first) * (last - (0 if window is None else max(0, first - window + 1)))
    return pairs


def _head_bytes(
    config: ModelConfig, num_due_tokens: int, *, trained: bool, dtype_bytes: int, machine: Machine
) -> int:  # fmt: skip
    """Pieces of logits and probabilities, the hidden states and their gradient, and a trained head's gradient."""
    piece = max(1, CHUNK_LOGITS // config.vocab_size)
    if machine == "cpu":
        # The gradient is written over the logits; what the product lays out anew is as large once more.
        piece_bytes = 2 * dtype_bytes
    else:
        # Probabilities are float32; in bfloat16 logits and their gradient are half of that each. While a second piece
        # is computed, the first one's probabilities are still there.
        piece_bytes = (2 if num_due_tokens <= piece else 3) * FLOAT32_BYTES
    total = piece_bytes * min(num_due_tokens, piece) * config.vocab_size
    total += 2 * num_due_tokens * config.hidden_size * dtype_bytes
    if trained:
        head = config.vocab_size * config.hidden_size
        total += head * FLOAT32_BYTES + (0 if dtype_bytes == FLOAT32_BYTES else 2 * head * dtype_bytes)
    return total

"""What the loop of `answer_loops` is told, as rows of int64: sizes and addresses, by their places."""

from __future__ import annotations

PLAN = (
    "layers", "width", "heads", "kv_heads", "head_width", "inner", "rows", "padded_rows", "segment_tokens",
    "max_segments", "table", "positions", "segments", "cos", "sin", "qkv", "attended", "acted", "own", "own_bytes",
    "most_keys", "counter", "give_way", "tile_shapes", "block_outputs",
    "adapters", "most_rank",
)  # fmt: skip
"""What the int64 of a plan are: sizes, and addresses. `own` is the first thread's room, `own_bytes` to the next's."""
(
    LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, INNER, NUM_ROWS, PADDED, SEGMENT_TOKENS, MAX_SEGMENTS, TABLE, POSITIONS,
    SEGMENTS, COS, SIN, QKV, ATTENDED, ACTED, OWN, OWN_BYTES, MOST_KEYS, COUNTER, GIVE_WAY, TILE_SHAPES, BLOCK_OUTPUTS,
    ADAPTERS, MOST_RANK,
) = range(len(PLAN))  # fmt: skip

TABLE_ROW = (
    "input_norm", "q", "k", "v", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "cache", "window", "out", "mlp_norm",
    "gate", "up", "down",
)  # fmt: skip
"""What a layer's int64 are: addresses, 0 where there is none; and the number of keys in its window, 0 for all."""
(
    INPUT_NORM, Q, K, V, Q_BIAS, K_BIAS, V_BIAS, Q_NORM, K_NORM, CACHE, WINDOW, OUT, MLP_NORM, GATE, UP, DOWN,
) = range(len(TABLE_ROW))  # fmt: skip


PROJECTIONS = ("q", "k", "v", "out", "gate", "up", "down")
"""What an adapter may change; of each its table has (address of down [r, in], of up [out, r], r), r 0 for none."""
OF_Q, OF_K, OF_V, OF_OUT, OF_GATE, OF_UP, OF_DOWN = range(len(PROJECTIONS))

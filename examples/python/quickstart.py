# SPDX-License-Identifier: Apache-2.0
import numpy as np

import attend

# One request, 4 query tokens, 4 query heads on 2 kv heads; its 20 keys lie in blocks 5 and 2.
q = np.full((4, 4, 64), 0.5, np.float32)
kv = np.full((2, 8, 16, 2, 64), np.nan, np.float32)  # K and V: 8 blocks of 16
block_table = np.array([[5, 2]], np.int32)
for j in range(20):  # all keys are equal, value j is j: the result is the mean of j
    kv[0, block_table[0, j // 16], j % 16] = 1.0
    kv[1, block_table[0, j // 16], j % 16] = j
out = attend.ops.flash_attn_varlen(
    q, kv[0], kv[1],
    query_start_loc=np.array([0, 4], np.int32),
    seq_lens=np.array([20], np.int32),
    block_table=block_table,
    causal=True,
)  # fmt: skip
for i in range(4):
    print(f"token {i}: {out[i, 0, 0]:g}")

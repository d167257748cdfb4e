# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's functions and wrappers under its names, for torch tensors on the CPU.

LSEs are logarithms to base 2, [tokens, heads]; minus infinity for rows without keys, and they count sinks. Paged
caches are [pages, 2, page_size, heads, dim] (NHD), [pages, 2, heads, page_size, dim] (HND) or a tuple (k, v) without
the dimension of two. Position encodings other than NONE, custom masks, CUDA graphs and outputs of another type raise
Unsupported by name. What only says how a GPU shall run (workspace buffers, splits, enable_pdl, use_tensor_cores)
changes no bit of a result here. Parameters that came after 0.6.18, up to 0.7.4, are there as well: those that ask for
something else than their defaults raise Unsupported where attend cannot do it.
"""

from .cascade import MultiLevelCascadeAttentionWrapper, merge_state, merge_state_in_place, merge_states
from .decode import BatchDecodeWithPagedKVCacheWrapper, single_decode_with_kv_cache
from .mla import BatchMLAPagedAttentionWrapper
from .page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from .prefill import BatchPrefillWithPagedKVCacheWrapper
from .ragged import BatchPrefillWithRaggedKVCacheWrapper, single_prefill_with_kv_cache

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "append_paged_kv_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
]

#: The version of FlashInfer whose interface this is.
__version__ = "0.6.18"

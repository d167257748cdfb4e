# SPDX-License-Identifier: Apache-2.0
"""What needs torch: operators that torch.compile and torch.export trace, and attention under any mask.

Importing this module registers torch.ops.attend.flash_attn_varlen, flash_attn_with_kvcache, merge_attn_states and
masked_attention.
"""

from . import ops
from .masked import masked_attention

__all__ = ["masked_attention", "ops"]

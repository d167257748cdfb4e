"""Problems as torch tensors."""
import math

import torch

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def load(data, name, dtype):
    """[batch, tokens, heads, head_dim] in memory of its own."""
    shape = data.shapes[name]
    t = torch.from_file(str(data.path(name)), size=math.prod(shape), dtype=torch.bfloat16)
    return t.view(shape).to(TYPES[dtype], copy=True)


def load_heads_first(data, name, dtype):
    """[batch, heads, tokens, head_dim], contiguous: what torch's attention reads best."""
    return load(data, name, dtype).transpose(1, 2).contiguous()


def to_numpy(t):
    return t.float().numpy()

# SPDX-License-Identifier: Apache-2.0
"""attend.torch.masked_attention against softmax attention written out in float64 torch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from attend import errors  # noqa: E402
from attend.torch import masked, masked_attention  # noqa: E402

SHAPES = ((9, 9), (5, 12), (1, 7), (12, 5), (40, 40))


def reference(q, k, v, mask, scale=None, softcap=0.0, sinks=None):
    """mask [B or 1, 1 or H, S, T]; a row that sees nothing is 0."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = torch.softmax(logits, -1).nan_to_num()[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2).float()


def problem(rows: int, keys: int, seed: int = 0, batch: int = 3):
    """Strided q, k and v with 4 heads on 2 and Dv != D, in the layout of Transformers."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((4, rows, 16), (2, keys, 16), (2, keys, 8))
    return g, *(torch.randn(batch, *size, generator=g).transpose(1, 2) for size in sizes)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


def positions(rows: int, keys: int):
    return torch.arange(keys) - torch.arange(keys - rows, keys)[:, None]


@pytest.mark.parametrize("rows, keys", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("masks", [(1, 1), (3, 1), (3, 4)])
def test_random_masks(rows, keys, density, masks):
    g, q, k, v = problem(rows, keys)
    mask = torch.rand(*masks, rows, keys, generator=g) < density
    sinks = torch.randn(4, generator=g)
    close(masked_attention(q, k, v, mask), reference(q, k, v, mask))
    options = dict(softcap=2.0, sinks=sinks, scale=0.7)
    close(masked_attention(q, k, v, mask, **options), reference(q, k, v, mask, **options))
    hidden = ~mask.any(-1).expand(3, 4, rows).transpose(1, 2)
    assert bool((masked_attention(q, k, v, mask)[hidden] == 0).all())


@pytest.mark.parametrize("rows, keys", SHAPES)
def test_masks_with_structure(rows, keys):
    g, q, k, v = problem(rows, keys)
    at = positions(rows, keys)
    columns = torch.rand(keys, generator=g) < 0.6
    block = torch.arange(keys) // 4
    own = block[(torch.arange(rows) + keys - rows).clamp_min(0)][:, None]
    cases = {
        "causal": at <= 0,
        "window": (at <= 0) & (at > -3),
        "causal over some keys": (at <= 0) & columns,
        "prefix": (at <= 0) | (torch.arange(keys) < 3),
        "blocks": (at <= 0) | (block == own),
        "chunks": (at <= 0) & (block == own),
        "both ways": at.abs() <= 2,
        "shrinking": at >= 0,
    }
    for name, mask in cases.items():
        mask = mask[None, None]
        assert masked_attention(q, k, v, mask).sub(reference(q, k, v, mask)).abs().max() < 2e-6, name


def test_hidden_keys_are_not_read():
    """Whatever lies in keys that nobody sees has no effect, not even NaN."""
    g, q, k, v = problem(9, 9)
    mask = torch.rand(1, 1, 9, 9, generator=g) < 0.5
    mask[..., 4] = False
    expected = masked_attention(q, k, v, mask)
    k[:, 4], v[:, 4] = torch.nan, torch.nan
    assert masked_attention(q, k, v, mask).equal(expected)
    listed = mask.expand(3, 1, 9, 9)[:, 0].int().topk(4, -1).indices.to(torch.int32)
    assert not bool(masked_attention(q, k, v, mask, indices=listed).isnan().any())


def test_rows_share_requests():
    """The structure is found: few requests for masks of kernels' own kind."""
    at = positions(40, 40)
    for mask, kinds in (
        ((at <= 0), [masked._GROW]),
        (torch.ones(40, 40, dtype=torch.bool), [masked._SAME]),
        ((at <= 0) & (at > -5), [masked._GROW, masked._SLIDE]),
    ):
        assert masked._runs(mask)[2] == kinds
    begin, end = masked._runs(torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < 0.5)[:2]
    assert begin == list(range(40)) and end == list(range(1, 41))


@pytest.mark.parametrize("entries", [1, 50, 1000])
def test_several_tables(entries, monkeypatch):
    """The bound on the memory of a table changes no bit."""
    g, q, k, v = problem(40, 40)
    mask = torch.rand(1, 1, 40, 40, generator=g) < 0.5
    listed = torch.randint(-1, 40, (3, 40, 7), generator=g, dtype=torch.int32)
    expected = masked_attention(q, k, v, mask), masked_attention(q, k, v, mask, indices=listed)
    monkeypatch.setattr(masked, "_TABLE_ENTRIES", entries)
    assert masked_attention(q, k, v, mask).equal(expected[0])
    assert masked_attention(q, k, v, mask, indices=listed).equal(expected[1])


PADDINGS = {
    "none": lambda keys: [(0, keys)] * 3,
    "left": lambda keys: [(0, keys), (2, keys), (4, keys)],
    "right": lambda keys: [(0, keys), (0, keys - 2), (0, 1)],
    "both": lambda keys: [(1, keys - 1), (0, keys - 2), (3, keys)],
    "empty": lambda keys: [(0, keys), (2, 2), (0, keys)],
}


@pytest.mark.parametrize("rows, keys", [(9, 9), (5, 12), (1, 7), (12, 9)])
@pytest.mark.parametrize("padding", [*PADDINGS, "holes"])
@pytest.mark.parametrize("causal, left, right", [(True, -1, -1), (True, 2, -1), (False, -1, -1), (False, 2, 3)])
def test_padding(rows, keys, padding, causal, left, right):
    g, q, k, v = problem(rows, keys)
    if padding == "holes":
        tokens = torch.rand(3, keys, generator=g) < 0.6
    else:
        tokens = torch.stack([(torch.arange(keys) >= b) & (torch.arange(keys) < e) for b, e in PADDINGS[padding](keys)])
    at = positions(rows, keys)
    mask = tokens[:, None, None, :] & ((at <= 0) | (not causal))
    mask = mask & ((at >= -left) | (left < 0)) & ((at <= right) | (right < 0))
    if causal:  # the rows of padding are 0; rows before the first key see nothing anyway
        token_rows = torch.cat([torch.zeros(3, max(rows - keys, 0), dtype=torch.bool), tokens[:, -rows:]], 1)
        mask = mask & token_rows[:, None, :, None]
    result = masked_attention(q, k, v, tokens, causal=causal, window_left=left, window_right=right)
    close(result, reference(q, k, v, mask))


@pytest.mark.parametrize("rows, keys", SHAPES)
@pytest.mark.parametrize("masked_rows", [True, False])
def test_indices(rows, keys, masked_rows):
    g, q, k, v = problem(rows, keys)
    listed = torch.rand(3, rows, keys, generator=g).topk(4, -1).indices.to(torch.int32)
    listed[:, ::3, 2] = -1
    chosen = torch.zeros(3, rows, keys + 1, dtype=torch.bool).scatter(-1, listed.long() % (keys + 1), True)[..., :keys]
    if masked_rows:
        mask = torch.rand(3, 1, rows, keys, generator=g) < 0.5
        close(masked_attention(q, k, v, mask, indices=listed), reference(q, k, v, mask & chosen[:, None]))
    else:
        mask = (positions(rows, keys) <= 0) & chosen[:, None]
        close(masked_attention(q, k, v, indices=listed, causal=True), reference(q, k, v, mask))


@pytest.mark.parametrize("batch, rows, keys", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_attend_to(batch, rows, keys):
    q, k = torch.randn(batch, rows, 4, 16), torch.randn(batch, keys, 2, 16)
    for kwargs in (
        {},
        {"mask": torch.zeros(batch, keys, dtype=torch.bool), "causal": True, "window_left": 1},
        {"mask": torch.zeros(batch, keys, dtype=torch.bool), "window_left": 1},
        {"mask": torch.zeros(batch, 1, rows, keys, dtype=torch.bool)},
        {"indices": torch.full((batch, rows, 2), -1)},
        {"indices": torch.zeros(batch, rows, 0, dtype=torch.int32)},
    ):
        out = masked_attention(q, k, k, **kwargs)
        assert out.shape == q.shape
        assert (keys > 0 and not kwargs) or bool((out == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types(dtype):
    g, q, k, v = problem(9, 9)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    mask = torch.rand(3, 1, 9, 9, generator=g) < 0.5
    result = masked_attention(q, k, v, mask)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), reference(q, k, v, mask), atol=2e-2, rtol=2e-2)


BAD = {
    "mask of a float": ("mask", dict(mask=torch.ones(3, 9)), errors.InvalidType),
    "mask of a wrong shape": ("mask", dict(mask=torch.ones(3, 8, dtype=torch.bool)), errors.InvalidArgument),
    "mask of three dimensions": ("mask", dict(mask=torch.ones(3, 9, 9, dtype=torch.bool)), errors.InvalidArgument),
    "causal twice": ("mask", dict(mask=torch.ones(3, 1, 9, 9, dtype=torch.bool), causal=True), errors.InvalidArgument),
    "indices of a float": ("indices", dict(indices=torch.ones(3, 9, 2)), errors.InvalidType),
    "indices out of range": ("indices", dict(indices=torch.full((3, 9, 2), 9)), errors.InvalidArgument),
    "indices of a wrong shape": ("indices", dict(indices=torch.zeros(3, 8, 2).int()), errors.InvalidArgument),
    "k of a wrong rank": ("k", dict(k=torch.ones(9, 2, 16)), errors.InvalidArgument),
    "k of another batch": ("k", dict(k=torch.ones(2, 9, 2, 16)), errors.InvalidArgument),
    "heads that do not divide": (
        "k",
        dict(k=torch.ones(3, 9, 3, 16), v=torch.ones(3, 9, 3, 8)),
        errors.InvalidArgument,
    ),
    "q of numpy": ("q", {"q": torch.ones(3, 9, 4, 16).numpy()}, errors.InvalidType),
    "mask elsewhere": ("mask", {"mask": torch.ones(3, 9, dtype=torch.bool, device="meta")}, errors.InvalidArgument),
    "no v": ("v", {"v": None}, errors.InvalidType),
    "sinks of a list": ("sinks", {"sinks": [0.0] * 4}, errors.InvalidType),
    "v of another length": ("v", dict(v=torch.ones(3, 8, 2, 8)), errors.InvalidArgument),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    argument, change, error = BAD[case]
    _, q, k, v = problem(9, 9)
    with pytest.raises(error, match=rf"\[masked_attention\] argument '{argument}': expected .*, got ") as caught:
        masked_attention(**(dict(q=q, k=k, v=v) | change))
    assert caught.value.argument == argument

# SPDX-License-Identifier: Apache-2.0
"""What a step's batch is, where its new keys go, and how it is split and reordered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Union

from . import _native
from ._fields import require_kind
from ._tensors import Tensor

__all__ = [
    "CommonMetadata",
    "DecodePrefillSplit",
    "LocalAttentionBatch",
    "make_kv_sharing_fast_prefill_metadata",
    "make_local_attention_virtual_batches",
    "make_slot_mapping",
    "reorder_swaps",
    "split_decodes_and_prefills",
]

#: A list, a tuple, or a tensor of one dimension of any framework; copied.
Integers = Union[Sequence[int], Tensor]
Flags = Union[Sequence[bool], Tensor]

_LENGTHS = ("query_start_loc", "seq_lens")
_SIZES = ("num_reqs", "num_tokens", "max_query_len", "max_seq_len")
_OPTIONAL = (
    "slot_mapping",
    "request_causal",
    "is_prefilling",
    "positions",
    "encoder_seq_lens",
    "encoder_slot_mapping",
    "dcp_local_seq_lens",
    "logits_indices",
)


class CommonMetadata:
    """Facts about one step's batch that every back end shares. B requests, T query tokens.

    It never changes; replace() makes another one. Numbers are copied. The block table is not: its tensor lives at
    least as long as this object and whatever was built from it.

    Args:
        query_start_loc: [B + 1], prefix sum of the query lengths; starts with 0.
        seq_lens: [B], keys visible per request, this step's tokens included.
        block_table: int32 [B, max_blocks], last stride 1: logical to physical block. None for encoders without cache.
            Entries behind a request's last used block are never read.
        slot_mapping: [T] or longer: where each new key goes, block * block_size + offset; -1 = nowhere.
        num_reqs, num_tokens: B and T without padding; None = len(seq_lens) and query_start_loc[num_reqs].
        max_query_len, max_seq_len: upper bounds, may be loose; None = the longest.
        causal: all requests, unless request_causal is given.
        request_causal: [B] flags; None = `causal` for all.
        is_prefilling: [B] flags: the request still computes its prompt; None = not known.
        positions: [T], absolute position of each query token; None = not known.
        encoder_seq_lens: [B], keys of encoder-decoder attention; 0 = a request without encoder input.
        encoder_slot_mapping: [E], slots of the encoder rows that this step brings.
        dcp_local_seq_lens: [B], keys that this rank holds under decode context parallelism.
        logits_indices: query tokens whose logits are wanted; None = not known.

    Raises:
        InvalidArgument, InvalidType: naming the first field that is wrong and the offending index.
    """

    __slots__ = ("_native",)

    def __init__(
        self,
        query_start_loc: Integers,
        seq_lens: Integers,
        *,
        block_table: Tensor | None = None,
        slot_mapping: Integers | None = None,
        num_reqs: int | None = None,
        num_tokens: int | None = None,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
        causal: bool = True,
        request_causal: Flags | None = None,
        is_prefilling: Flags | None = None,
        positions: Integers | None = None,
        encoder_seq_lens: Integers | None = None,
        encoder_slot_mapping: Integers | None = None,
        dcp_local_seq_lens: Integers | None = None,
        logits_indices: Integers | None = None,
    ) -> None:
        self._native = _native.CommonMetadata(
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=block_table,
            slot_mapping=slot_mapping,
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            causal=causal,
            request_causal=request_causal,
            is_prefilling=is_prefilling,
            positions=positions,
            encoder_seq_lens=encoder_seq_lens,
            encoder_slot_mapping=encoder_slot_mapping,
            dcp_local_seq_lens=dcp_local_seq_lens,
            logits_indices=logits_indices,
        )

    def _optional(self, name: str) -> Any:
        values = getattr(self._native, name)
        return values if values.size else None

    query_start_loc = property(lambda self: self._native.query_start_loc, doc="Read-only int32 array of numpy.")
    seq_lens = property(lambda self: self._native.seq_lens, doc="Read-only int32 array of numpy.")
    block_table = property(lambda self: self._native.block_table, doc="The tensor, or None.")
    num_reqs = property(lambda self: self._native.num_reqs, doc="B, without padding.")
    num_tokens = property(lambda self: self._native.num_tokens, doc="T, without padding.")
    max_query_len = property(lambda self: self._native.max_query_len, doc="Upper bound of the query lengths.")
    max_seq_len = property(lambda self: self._native.max_seq_len, doc="Upper bound of seq_lens.")
    causal = property(lambda self: self._native.causal, doc="All requests, unless request_causal is given.")
    slot_mapping = property(lambda self: self._optional("slot_mapping"), doc="Read-only int64 array, or None.")
    request_causal = property(lambda self: self._optional("request_causal"), doc="Read-only uint8 array, or None.")
    is_prefilling = property(lambda self: self._optional("is_prefilling"), doc="Read-only uint8 array, or None.")
    positions = property(lambda self: self._optional("positions"), doc="Read-only int64 array, or None.")
    encoder_seq_lens = property(lambda self: self._optional("encoder_seq_lens"), doc="Read-only int32 array, or None.")
    encoder_slot_mapping = property(
        lambda self: self._optional("encoder_slot_mapping"), doc="Read-only int64 array, or None."
    )
    dcp_local_seq_lens = property(
        lambda self: self._optional("dcp_local_seq_lens"), doc="Read-only int32 array, or None."
    )
    logits_indices = property(lambda self: self._optional("logits_indices"), doc="Read-only int32 array, or None.")

    def replace(self, **changes: Any) -> CommonMetadata:
        """A copy in which the named fields differ. Sizes follow from new lengths unless they are given too."""
        kept = ("block_table", "causal") + _OPTIONAL + _LENGTHS
        if not changes.keys() & set(_LENGTHS):
            kept += _SIZES
        return CommonMetadata(**{name: getattr(self, name) for name in kept if name not in changes}, **changes)

    def validate(self, block_size: int = 0) -> None:
        """Checks every invariant again, and with a block size that the block table is wide enough.

        Args:
            block_size: tokens a block; 0 = leave the width alone.

        Raises:
            InvalidArgument: naming the field and the offending index.
        """
        self._native.validate(block_size=block_size)

    def key_start_loc(self) -> Any:
        """int32 array [B + 1], exclusive prefix sum of seq_lens."""
        return self._native.key_start_loc()

    def unpadded(self, tokens: int | None = None, reqs: int | None = None) -> CommonMetadata:
        """The first `reqs` requests and `tokens` tokens of every field; None = num_reqs and num_tokens."""
        return _wrapped(self._native.unpadded(tokens=tokens, reqs=reqs))

    def __repr__(self) -> str:
        return (
            f"CommonMetadata(num_reqs={self.num_reqs}, num_tokens={self.num_tokens}, "
            f"max_query_len={self.max_query_len}, max_seq_len={self.max_seq_len})"
        )


def _wrapped(native: Any) -> CommonMetadata:
    metadata = CommonMetadata.__new__(CommonMetadata)
    metadata._native = native
    return metadata


def native_batch(function: str, argument: str, metadata: CommonMetadata) -> Any:
    """The native object of a batch."""
    return require_kind(function, argument, metadata, CommonMetadata)._native


class DecodePrefillSplit(NamedTuple):
    """How many requests and tokens are decodes, which come first, and how many are not."""

    num_decodes: int
    num_prefills: int
    num_decode_tokens: int
    num_prefill_tokens: int


class LocalAttentionBatch(NamedTuple):
    """A batch for layers with chunked local attention."""

    common: CommonMetadata  #: of V virtual requests
    request_of: Any  #: int32 array [V], the request that a virtual one is a part of, ascending


def make_slot_mapping(
    metadata: CommonMetadata, block_size: int, *, sliding_window: int | None = None, padded_tokens: int = 0
) -> Tensor:
    """Where each new key goes, from the block table; -1 everywhere without one.

    Args:
        metadata: the batch; its own slot_mapping is ignored.
        block_size: tokens a block.
        sliding_window: window of the layers in tokens; None = all tokens get slots. Where no request of the batch has
            computed tokens, those before the last `sliding_window` of a prompt get none.
        padded_tokens: entries of the result, those behind the tokens -1; 0 = num_tokens.

    Returns:
        int64 [T], of torch if the block table is, else of numpy.

    Raises:
        InvalidArgument: numbers out of range; a negative entry of the block table where a key goes.
    """
    return _native.make_slot_mapping(
        metadata=native_batch("make_slot_mapping", "metadata", metadata),
        block_size=block_size,
        sliding_window=sliding_window,
        padded_tokens=padded_tokens,
    )


def split_decodes_and_prefills(
    metadata: CommonMetadata,
    *,
    decode_threshold: int = 1,
    require_uniform: bool = False,
    treat_short_extends_as_decodes: bool = True,
    fresh_prompts_are_prefills: bool = False,
) -> DecodePrefillSplit:
    """Splits a batch that is ordered decodes first. From the first prefill on everything counts as prefill.

    Args:
        metadata: the batch.
        decode_threshold: longest query that counts as decode, >= 1.
        require_uniform: decodes must have the first request's query length (or 0).
        treat_short_extends_as_decodes: False: requests with is_prefilling set are prefills.
        fresh_prompts_are_prefills: requests without computed tokens are prefills however short.

    Raises:
        InvalidArgument: treat_short_extends_as_decodes is False and the batch has no is_prefilling.
    """
    return DecodePrefillSplit(
        *_native.split_decodes_and_prefills(
            metadata=native_batch("split_decodes_and_prefills", "metadata", metadata),
            decode_threshold=decode_threshold,
            require_uniform=require_uniform,
            treat_short_extends_as_decodes=treat_short_extends_as_decodes,
            fresh_prompts_are_prefills=fresh_prompts_are_prefills,
        )
    )


def reorder_swaps(
    num_scheduled_tokens: Integers,
    num_computed_tokens: Integers,
    num_prompt_tokens: Integers,
    decode_threshold: int = 1,
) -> list[tuple[int, int]]:
    """Swaps that bring a batch into the order decode, short extend, long extend, prefill with as few moves as possible.

    Args:
        num_scheduled_tokens: [B], query tokens of this step.
        num_computed_tokens: [B], tokens already in the cache.
        num_prompt_tokens: [B], length of the prompt.
        decode_threshold: longest query that counts as decode, >= 1.

    Returns:
        Pairs of rows to swap, in this order; empty if nothing moves.
    """
    return _native.reorder_swaps(
        num_scheduled_tokens=num_scheduled_tokens,
        num_computed_tokens=num_computed_tokens,
        num_prompt_tokens=num_prompt_tokens,
        decode_threshold=decode_threshold,
    )


def make_kv_sharing_fast_prefill_metadata(metadata: CommonMetadata) -> CommonMetadata:
    """The batch for layers behind the last one that owns a cache: only the rows of metadata.logits_indices.

    Row i of the result is token logits_indices[i]. Requests keep their keys; a batch without a query of more than one
    token comes back as it is.

    Raises:
        InvalidArgument: logits_indices missing, not ascending or not the last tokens of a request; a request that is
            not causal.
    """
    function = "make_kv_sharing_fast_prefill_metadata"
    return _wrapped(
        _native.make_kv_sharing_fast_prefill_metadata(metadata=native_batch(function, "metadata", metadata))
    )


def make_local_attention_virtual_batches(
    chunk_size: int, block_size: int, metadata: CommonMetadata
) -> LocalAttentionBatch:
    """The batch for layers in which a query at position p sees the keys from the last multiple of `chunk_size` to p.

    Each request is cut into one virtual request for every chunk that its new tokens touch; tokens keep their order.

    Args:
        chunk_size: keys of a chunk, a multiple of block_size.
        block_size: tokens a block.
        metadata: the batch, causal, with a block table.

    Raises:
        InvalidArgument: as above; dcp_local_seq_lens given.
    """
    function = "make_local_attention_virtual_batches"
    common, request_of = _native.make_local_attention_virtual_batches(
        chunk_size=chunk_size, block_size=block_size, metadata=native_batch(function, "metadata", metadata)
    )
    return LocalAttentionBatch(_wrapped(common), request_of)

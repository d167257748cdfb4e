// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// From tokens that an indexer chose, numbered within their request, to rows of a cache. Same
/// semantics as vLLM's functions of these names (there with the prefix triton_).
///
/// Indices are untrusted: whatever they are, a result is -1 or a row that exists. An executor of
/// null is default_executor(). Everything else is checked before anything is written.
namespace attend {

/// A cache in pages, seen as rows: token `offset` of block `id` is row id * stride + offset.
struct SparseIndexPages {
  /// i32 [R, max_blocks], last dimension stride 1: blocks of each request.
  ConstTensorView block_table;
  std::int64_t num_blocks = 0;  ///< of the cache; >= 0
  int block_size = 0;           ///< tokens a block; >= 1
  /// Rows from one block to the next, >= block_size, where blocks lie apart; 0 = block_size.
  std::int64_t block_stride_rows = 0;
};

/// Arguments of convert_req_index_to_global_index.
struct ConvertReqIndexToGlobalIndexArgs {
  ConstTensorView req_id;  ///< i32 [T], contiguous: request of each query token
  SparseIndexPages pages;
  ConstTensorView token_indices;  ///< i32 [T, K], K >= 1, any row stride, last dimension stride 1
  /// i32 [T, K] likewise: the rows, in the order of the tokens. May be token_indices itself.
  TensorView out;
  /// i32 [T], contiguous: how many entries of each row of `out` are not -1; undefined = not wanted.
  TensorView valid_counts = {};
  /// i32 [T], contiguous: the entry of prefill_workspace_starts for query tokens whose keys lie in
  /// the workspace, negative for those that read the pages; undefined = all read the pages.
  ConstTensorView prefill_workspace_request_ids = {};
  /// i32 [P], contiguous: row of the workspace that holds token 0. Needed with the ids above.
  ConstTensorView prefill_workspace_starts = {};
  std::int64_t workspace_rows = 0;  ///< rows that the workspace has; read with the ids above
};

/// out[t, j] = the row of token token_indices[t, j] of request req_id[t]: in the pages by the block
/// table, in the workspace starts[id] + token. -1 for a token that is negative, has no entry in the
/// table or lies in a block outside [0, num_blocks); for a row outside [0, workspace_rows); for
/// every token of a request outside [0, R) or a workspace id >= P. Duplicates stay.
/// @throws InvalidArgument (shapes, dtypes, sizes, pages or a workspace with rows beyond the range
/// of i32, memory that overlaps a result), before any write.
void convert_req_index_to_global_index(const ConvertReqIndexToGlobalIndexArgs& args,
                                       Executor* executor = nullptr);

/// Arguments of filter_and_convert_dcp_index. Position p belongs to rank (p / interleave) mod
/// world_size, which stores its own tokens densely.
struct FilterAndConvertDcpIndexArgs {
  ConstTensorView req_id;         ///< as above
  SparseIndexPages pages;         ///< of this rank
  ConstTensorView token_indices;  ///< as above: positions in the whole request
  TensorView out;                 ///< as above
  TensorView valid_counts = {};   ///< as above
  int world_size = 1;             ///< >= 1
  int interleave = 1;             ///< >= 1
  int rank = 0;                   ///< in [0, world_size)
  /// True: entries that are not -1 come first, in their order, and then the -1.
  bool compact_to_front = false;
};

/// As convert_req_index_to_global_index() in the pages, for the tokens of this rank, by their
/// index among them; -1 for those of other ranks. @throws InvalidArgument likewise.
void filter_and_convert_dcp_index(const FilterAndConvertDcpIndexArgs& args,
                                  Executor* executor = nullptr);

}  // namespace attend

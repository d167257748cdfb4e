// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>

#include "attend/core/cpu.h"
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// The logits by which the indexer of sparse MLA ranks the tokens of a request. Same semantics as
/// DeepGEMM's functions of these names. Of row i and key j:
///
///   logit = k_scale[j] * sum over heads h of weights[i, h] * max(q[i, h] . k[j], 0)
///
/// on e4m3 codes of 128 elements; scales of queries are in the weights (prepare_indexer()). Sums
/// are float32. A logit depends on its row, its key and the instruction-set level only: neither on
/// its place in a batch, on pages, nor on the number of workers. A NaN code makes all logits of its
/// key (or of its row) NaN, the positive quiet one, which top_k_per_row_* puts below every number.
/// An executor of null is default_executor(). isa: highest level of the kernels; unset =
/// active_isa(). Everything is checked before anything is written.
namespace attend {

/// Arguments of fp8_mqa_logits. M rows, H >= 1 heads, Nk keys.
struct Fp8MqaLogitsArgs {
  ConstTensorView q;        ///< fp8_e4m3 [M, H, 128], last dimension stride 1
  ConstTensorView k;        ///< fp8_e4m3 [Nk, 128], last dimension stride 1; Nk < 2^31
  ConstTensorView k_scale;  ///< f32 [Nk], contiguous
  ConstTensorView weights;  ///< f32 [M, H], last dimension stride 1
  /// i32 [M], contiguous: row i has the keys [ks[i], ke[i]), within [0, Nk). Keys of no row are not
  /// read.
  ConstTensorView ks, ke;
  TensorView logits;  ///< f32 [M, Nk], any row stride, last dimension stride 1
  /// Other keys get the logit -infinity; false = their places are not touched.
  bool clean_logits = true;
};

/// @throws InvalidArgument (shapes, strides, dtypes, a start after its end or outside of the keys,
/// memory that overlaps the result); Unsupported for a level that there is not. Before any write.
void fp8_mqa_logits(const Fp8MqaLogitsArgs& args, Executor* executor = nullptr,
                    std::optional<IsaLevel> isa = std::nullopt);

/// Arguments of fp8_paged_mqa_logits. B requests of next_n query tokens, H >= 1 heads.
struct Fp8PagedMqaLogitsArgs {
  ConstTensorView q;  ///< fp8_e4m3 [B, next_n, H, 128], last dimension stride 1; next_n >= 1
  /// The indexer's cache, u8 [num_blocks, block_size, 132] or [num_blocks, block_size, 1, 132], as
  /// indexer_cache.h says.
  ConstTensorView kv_cache;
  ConstTensorView weights;  ///< f32 [B * next_n, H], last dimension stride 1
  /// i32 [B], contiguous: tokens of each request with this step's, >= 0; query token n sees the
  /// first context_lens[b] - next_n + n + 1, none if that is negative. Or [B, next_n]: how many
  /// each token sees.
  ConstTensorView context_lens;
  /// i32 [B, max_blocks], last dimension stride 1: blocks of each request. Only the entries that
  /// are needed are read.
  ConstTensorView block_table;
  /// i32 [num_sms + 1, 2], contiguous: as get_paged_mqa_logits_metadata() wrote it for these
  /// lengths and this block size; another is refused. Undefined = none. The kernels have a schedule
  /// of their own: it does not change any bit.
  ConstTensorView schedule_metadata;
  /// f32 [B * next_n, max_model_len], any row stride, last dimension stride 1.
  TensorView logits;
  bool clean_logits = true;  ///< as in Fp8MqaLogitsArgs
};

/// Row b * next_n + n = the logits of query token n of request b with the keys that it sees, by
/// position. Bits are those of fp8_mqa_logits() with the keys that
/// cp_gather_indexer_k_quant_cache() gives. @throws as above, and InvalidArgument for lengths
/// beyond max_model_len or the table and block ids outside of the cache. Before any write.
void fp8_paged_mqa_logits(const Fp8PagedMqaLogitsArgs& args, Executor* executor = nullptr,
                          std::optional<IsaLevel> isa = std::nullopt);

/// Arguments of get_paged_mqa_logits_metadata.
struct PagedMqaLogitsMetadataArgs {
  ConstTensorView context_lens;  ///< i32 [B] or [B, next_n], contiguous, each >= 0
  int block_size = 64;           ///< tokens of a block of the cache; >= 1
  TensorView schedule_metadata;  ///< i32 [num_sms + 1, 2], contiguous, num_sms >= 1
};

/// Cuts the keys of all requests, in segments of 4 blocks, into num_sms parts of equal numbers, the
/// first ones one more where that does not come out even. Row i: request and segment in it where
/// part i begins; the last row is the end. Lengths of [B, next_n] count by their last column.
/// Definition: DeepGEMM's function of this name.
/// @throws InvalidArgument, before anything is written.
void get_paged_mqa_logits_metadata(const PagedMqaLogitsMetadataArgs& args);

}  // namespace attend

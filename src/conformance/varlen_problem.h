// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <optional>
#include <vector>

#include "attend/ops/attention.h"
#include "attend/plan/attention_plan.h"
#include "attend/plan/kernel_choice.h"
#include "conformance/attention_shape.h"
#include "conformance/comparison.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// How the keys and values of a problem are stored.
enum class KvStorage : std::uint8_t { ragged, paged_nhd, paged_hnd };

/// Memory options of a problem.
struct VarlenOptions {
  KvStorage kv = KvStorage::ragged;
  int block_size = 16;   ///< paged
  bool padded = false;   ///< gaps between rows of every tensor
  bool layered = false;  ///< paged: other layers lie between consecutive blocks
  bool lse = true;
  bool lse_by_head = false;     ///< lse stored as [Hq, T]
  std::optional<DType> codes;   ///< of keys and values: fp8 or i8
  bool token_scales = false;    ///< with codes; always with i8
  bool fp8_queries = false;     ///< with fp8 keys and values
  bool share_prefixes = false;  ///< paged: some requests begin with the same blocks
};
VarlenOptions random_varlen_options(Rng& rng);

/// A flash_attn_varlen problem with its memory. What no query may read is NaN: unused slots and
/// blocks, gaps between rows, keys that no query of their request sees; block-table entries beyond
/// the last used block are out of range.
struct VarlenProblem {
  VarlenProblem(Rng& rng, AttentionShape attention_shape, const VarlenOptions& memory);

  /// The op's arguments; views point into the storages below.
  FlashAttnVarlenArgs args() const;
  /// Puts the outputs back to what they were before the op.
  void reset();
  KernelKind kind() const;
  std::string describe() const;

  AttentionShape shape;
  VarlenOptions options;
  std::vector<SharedPrefix> shared_prefixes;  ///< with options.share_prefixes
  Storage q, k, v, out, lse;
  HeadValues head_values;
  Storage q_descale, k_descale, v_descale;  ///< of fp8 problems, each or none
  Storage k_token_scale, v_token_scale;
  Storage query_start_loc, cu_seqlens_kv, seq_lens, block_table;
  AttentionParams params;

 private:
  DType kv_dtype() const noexcept { return options.codes.value_or(shape.dtype); }
  void make_descales(Rng& rng);
  void make_ragged(Rng& rng);
  void make_paged(Rng& rng);
  /// `row`: of k and v, [token or (block, offset), head, 0].
  void fill_row(Rng& rng, std::initializer_list<std::int64_t> row);
  void make_token_scales(Rng& rng, const std::vector<std::int64_t>& rows, const Layout& layout);
};

}  // namespace attend::conformance

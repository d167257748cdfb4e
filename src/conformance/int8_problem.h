// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "attend/ops/int8_attention.h"
#include "conformance/attention_shape.h"
#include "conformance/random_blocks.h"
#include "conformance/storage.h"

namespace attend::conformance {

/// Memory options of a problem over int8 queries and keys.
struct Int8Options {
  DType values = DType::i8;  ///< i8 (level 1), f16 or bf16 (level 2)
  DType out = DType::bf16;
  int block_size = 16;
  bool padded = false;  ///< gaps between rows of every tensor
  bool lse = true;
  bool smooth_keys = false;
  bool share_prefixes = false;  ///< some requests begin with the same blocks
};
Int8Options random_int8_options(Rng& rng);

/// An int8 problem with its memory. Scales that no query may use are NaN; block-table entries
/// beyond the last used block are out of range.
struct Int8Problem {
  Int8Problem(Rng& rng, AttentionShape attention_shape, const Int8Options& memory);

  /// The op's arguments; views point into the storages below.
  FlashAttnVarlenInt8Args args() const;
  /// Puts the outputs back to what they were before the op.
  void reset();
  std::string describe() const;

  AttentionShape shape;
  Int8Options options;
  std::vector<SharedPrefix> shared_prefixes;  ///< with options.share_prefixes
  Storage q, q_scale, k, k_scale, v, v_scale, k_mean, out, lse;
  HeadValues head_values;
  Storage query_start_loc, seq_lens;
  RandomBlocks blocks;
  AttentionParams params;

 private:
  void fill_cache(Rng& rng);
};

}  // namespace attend::conformance

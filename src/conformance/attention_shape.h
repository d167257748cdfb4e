// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "attend/ops/attention.h"
#include "conformance/rng.h"
#include "conformance/storage.h"

namespace attend::conformance {

enum class AlibiSlopes : std::uint8_t { none, per_head, per_request_and_head };

/// What a random attention problem looks like, without its memory.
struct AttentionShape {
  DType dtype = DType::f32;
  int kv_heads = 1, group_size = 1;
  int head_dim = 64, head_dim_v = 64;
  std::vector<std::int32_t> query_lens, seq_lens;  ///< [B]
  bool causal = false;
  int window_left = -1, window_right = -1;
  float softcap = 0.0F;
  AlibiSlopes alibi = AlibiSlopes::none;
  bool alibi_sqrt = false;
  bool sinks = false;
  bool lse_includes_sink = false;
  bool default_scale = true;
  double query_magnitude = 1.0;  ///< large ones give peaked softmaxes
  double value_magnitude = 1.0;

  int num_reqs() const noexcept { return static_cast<int>(query_lens.size()); }
  int q_heads() const noexcept { return kv_heads * group_size; }
  std::vector<std::int32_t> query_start_loc() const;  ///< [B + 1]
  std::vector<std::int32_t> key_start_loc() const;    ///< [B + 1]
  /// First key of a request that any of its queries sees; seq_len if none does.
  std::int32_t first_visible_key(int request) const noexcept;
  /// first_visible_key of every request.
  std::vector<std::int32_t> hidden_keys() const;
  std::string describe() const;
};

/// Limits on what random_shape may draw.
struct ShapeLimits {
  bool uniform_query_len = false;     ///< all requests have the same query length >= 1
  bool keys_cover_queries = false;    ///< seq_len >= query_len
  bool same_head_dims = false;        ///< head_dim_v == head_dim
  std::int64_t products = 4'000'000;  ///< most multiplications of the oracle
};

/// Heads, sizes, lengths and mask features, each alone and in every combination.
AttentionShape random_shape(Rng& rng, const ShapeLimits& limits = {});

/// Values per head that the parameters point to.
struct HeadValues {
  Storage slopes, sinks;
};

/// Scale, mask, softcap, slopes and sinks as the op takes them.
AttentionParams make_params(Rng& rng, const AttentionShape& shape, HeadValues& values);

/// A block size that paged ops accept.
int random_block_size(Rng& rng);

}  // namespace attend::conformance

// SPDX-License-Identifier: Apache-2.0
// Keys that the mask hides from a row have no effect on its bits, whatever they hold.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "properties/stepped_batch.h"
#include "support/scale.h"

namespace attend::testing {
namespace {

bool sees(const AttentionShape& s, std::int64_t position, std::int64_t key) {
  if (s.window_left >= 0 && key < position - s.window_left) return false;
  if (s.causal) return key <= position;
  return s.window_right < 0 || key <= position + s.window_right;
}

/// Overwrites keys, values or both of some positions of a request.
void spoil(Rng& rng, BatchData& data, int request, const std::vector<std::int64_t>& keys) {
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::int64_t first = data.shape.key_start_loc()[static_cast<std::size_t>(request)];
  for (const std::int64_t j : keys) {
    const double value = rng.pick({nan, inf, -inf, 60000.0});
    const int which = rng.range(0, 2);
    for (int h = 0; h < data.shape.kv_heads; ++h) {
      for (int d = 0; d < data.shape.head_dim && which != 1; ++d) {
        data.k.set(data.k.offset({first + j, h, d}), value);
      }
      for (int d = 0; d < data.shape.head_dim_v && which != 0; ++d) {
        data.v.set(data.v.offset({first + j, h, d}), value);
      }
    }
  }
}

/// A position at the edge of what a random query sees, or anywhere.
std::int64_t random_position(Rng& rng, const AttentionShape& s, int request) {
  const auto r = static_cast<std::size_t>(request);
  const std::int64_t query = s.seq_lens[r] - rng.range(1, s.query_lens[r]);
  std::int64_t at = rng.range(0, s.seq_lens[r] - 1);
  if (rng.chance(0.6)) at = query + (s.causal ? 0 : std::max(0, s.window_right)) + rng.range(0, 2);
  if (s.window_left >= 0 && rng.chance(0.4)) at = query - s.window_left - rng.range(0, 2);
  return std::clamp<std::int64_t>(at, 0, s.seq_lens[r] - 1);
}

/// A single key, everything from a position on, or everything before it.
std::vector<std::int64_t> random_keys(Rng& rng, const AttentionShape& s, int request) {
  const std::int64_t at = random_position(rng, s, request);
  std::int64_t begin = at, end = at + 1;
  if (rng.chance(0.4)) end = s.seq_lens[static_cast<std::size_t>(request)];
  if (rng.chance(0.2)) begin = 0;
  std::vector<std::int64_t> keys;
  for (std::int64_t j = begin; j < end; ++j) keys.push_back(j);
  return keys;
}

/// Compares the rows that see none of `keys`; returns how many there were.
int compare_rows(const AttentionShape& s, int request, const std::vector<std::int64_t>& keys,
                 const SteppedBatch& clean, const SteppedBatch& spoilt) {
  const auto r = static_cast<std::size_t>(request);
  int compared = 0;
  for (int i = 0; i < s.query_lens[r]; ++i) {
    const std::int64_t position = s.seq_lens[r] - s.query_lens[r] + i;
    bool hidden = true;
    for (const std::int64_t j : keys) hidden = hidden && !sees(s, position, j);
    if (!hidden) continue;
    ++compared;
    if (clean.row(request, i) == spoilt.row(request, i)) continue;
    ADD_FAILURE() << "query " << i << " of request " << request << " changed with a hidden key in ["
                  << keys.front() << ", " << keys.back() << "]";
    break;
  }
  return compared;
}

class HiddenKeys : public ::testing::TestWithParam<IsaLevel> {};

TEST_P(HiddenKeys, HaveNoEffectOnARow) {
  int compared = 0;
  for (int i = 0; i < scaled(60, 4) && !HasFailure(); ++i) {
    Rng rng(static_cast<std::uint64_t>(5000 + i));
    BatchData data(rng, random_steps_shape(rng, 20'000'000, true));
    SCOPED_TRACE("batch " + std::to_string(i) + ": " + data.shape.describe());
    StepOptions options;
    options.kernels = GetParam();
    options.executor = &executor_of(1 + i % 2);
    options.kv = rng.pick({KvStorage::ragged, KvStorage::paged_nhd});
    SteppedBatch clean(rng, data, options);
    clean.run_whole();

    const int request = rng.range(0, data.shape.num_reqs() - 1);
    const std::vector<std::int64_t> keys = random_keys(rng, data.shape, request);
    spoil(rng, data, request, keys);
    SteppedBatch spoilt(rng, data, options);
    spoilt.run_whole();
    for (int r = 0; r < data.shape.num_reqs(); ++r) {
      compared += compare_rows(data.shape, r, r == request ? keys : std::vector<std::int64_t>{},
                               clean, spoilt);
    }
  }
  EXPECT_GT(compared, scaled(500, 50));
}

INSTANTIATE_TEST_SUITE_P(Levels, HiddenKeys, ::testing::ValuesIn(available_isa_levels()),
                         [](const auto& info) { return std::string(to_string(info.param)); });

}  // namespace
}  // namespace attend::testing

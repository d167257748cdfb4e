// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/common_metadata.h"

#include <algorithm>

#include "core/check.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "CommonMetadata::validate";

// The first `count` entries; padding behind them is not looked at.
template <typename T>
std::span<const T> first(const std::vector<T>& values, int count) noexcept {
  return {values.data(), static_cast<std::size_t>(count)};
}

template <typename T>
void require_length(std::string_view name, const std::vector<T>& values, std::int64_t at_least) {
  check::require(
      static_cast<std::int64_t>(values.size()) >= at_least, {kOp, name},
      [&] { return fmt::format("at least {} entries", at_least); },
      [&] { return fmt::format("{}", values.size()); });
}

template <typename T>
void require_length_or_empty(std::string_view name, const std::vector<T>& values,
                             std::int64_t at_least) {
  if (!values.empty()) require_length(name, values, at_least);
}

// Every one of the first `count` entries is in [low, high].
template <typename T>
void require_range(std::string_view name, const std::vector<T>& values, int count, T low, T high) {
  for (int i = 0; i < count; ++i) {
    const T value = values[static_cast<std::size_t>(i)];
    check::require(
        value >= low && value <= high, {kOp, name},
        [&] { return fmt::format("values from {} to {}", low, high); },
        [&] { return fmt::format("{} at index {}", +value, i); });
  }
}

void validate_counts(const CommonMetadata& m) {
  const auto at_least_zero = [](std::string_view name, int value) {
    check::require(value >= 0, {kOp, name}, "a number >= 0", value);
  };
  at_least_zero("num_reqs", m.num_reqs);
  at_least_zero("num_tokens", m.num_tokens);
  at_least_zero("max_query_len", m.max_query_len);
  at_least_zero("max_seq_len", m.max_seq_len);
}

void validate_queries(const CommonMetadata& m) {
  constexpr std::string_view kName = "query_start_loc";
  require_length(kName, m.query_start_loc, std::int64_t{m.num_reqs} + 1);
  const auto starts = first(m.query_start_loc, m.num_reqs + 1);
  check::require(starts[0] == 0, {kOp, kName}, "0 at index 0",
                 [&] { return fmt::format("{}", starts[0]); });
  for (std::size_t r = 1; r < starts.size(); ++r) {
    check::require(starts[r] >= starts[r - 1], {kOp, kName}, "values that never decrease", [&] {
      return fmt::format("{} after {} at index {}", starts[r], starts[r - 1], r);
    });
    check::require(
        starts[r] - starts[r - 1] <= m.max_query_len, {kOp, "max_query_len"},
        [&] {
          return fmt::format("at least {}, the query length of request {}",
                             starts[r] - starts[r - 1], r - 1);
        },
        m.max_query_len);
  }
  check::require(
      starts.back() == m.num_tokens, {kOp, kName},
      [&] { return fmt::format("num_tokens {} at index {}", m.num_tokens, m.num_reqs); },
      [&] { return fmt::format("{}", starts.back()); });
}

void validate_keys(const CommonMetadata& m) {
  constexpr std::string_view kName = "seq_lens";
  require_length(kName, m.seq_lens, m.num_reqs);
  for (int r = 0; r < m.num_reqs; ++r) {
    const std::int32_t seq_len = m.seq_lens[static_cast<std::size_t>(r)];
    check::require(
        seq_len >= m.query_len(r), {kOp, kName},
        [&] { return fmt::format("at least the query length {}", m.query_len(r)); },
        [&] { return fmt::format("{} at index {}", seq_len, r); });
    check::require(
        seq_len <= m.max_seq_len, {kOp, "max_seq_len"},
        [&] { return fmt::format("at least {}, the length of request {}", seq_len, r); },
        m.max_seq_len);
  }
}

void validate_block_table(const CommonMetadata& m, int block_size) {
  if (!m.block_table.defined()) return;
  const check::Where where{kOp, "block_table"};
  check::tensor(where, m.block_table, 2, {DType::i32});
  check::unit_last_stride(where, m.block_table);
  check::require(
      m.block_table.shape[0] >= m.num_reqs, where,
      [&] { return fmt::format("at least {} rows", m.num_reqs); },
      [&] { return describe(m.block_table); });
  if (block_size <= 0) return;
  for (int r = 0; r < m.num_reqs; ++r) {
    const std::int64_t seq_len = m.seq_lens[static_cast<std::size_t>(r)];
    const std::int64_t blocks = (seq_len + block_size - 1) / block_size;
    check::require(
        blocks <= m.block_table.shape[1], where,
        [&] {
          return fmt::format("at least {} columns of block size {} for the {} keys of request {}",
                             blocks, block_size, seq_len, r);
        },
        [&] { return describe(m.block_table); });
  }
}

void require_slots(std::string_view name, std::span<const std::int64_t> slots) {
  for (std::size_t i = 0; i < slots.size(); ++i) {
    check::require(slots[i] >= -1, {kOp, name}, "slots >= 0, or -1 for none",
                   [&] { return fmt::format("{} at index {}", slots[i], i); });
  }
}

void validate_slots(const CommonMetadata& m) {
  // Encoders have no cache: neither a table nor slots.
  require_length_or_empty("slot_mapping", m.slot_mapping, m.num_tokens);
  if (!m.slot_mapping.empty()) require_slots("slot_mapping", first(m.slot_mapping, m.num_tokens));
  require_slots("encoder_slot_mapping", m.encoder_slot_mapping);
}

void validate_optional_fields(const CommonMetadata& m) {
  constexpr std::int32_t kMax = INT32_MAX;
  const auto flags = [&](std::string_view name, const std::vector<std::uint8_t>& values) {
    require_length_or_empty(name, values, m.num_reqs);
    if (!values.empty()) require_range<std::uint8_t>(name, values, m.num_reqs, 0, 1);
  };
  const auto lengths = [&](std::string_view name, const std::vector<std::int32_t>& values) {
    require_length_or_empty(name, values, m.num_reqs);
    if (!values.empty()) require_range<std::int32_t>(name, values, m.num_reqs, 0, kMax);
  };
  flags("request_causal", m.request_causal);
  flags("is_prefilling", m.is_prefilling);
  require_length_or_empty("positions", m.positions, m.num_tokens);
  if (!m.positions.empty()) {
    require_range<std::int64_t>("positions", m.positions, m.num_tokens, 0, INT64_MAX);
  }
  lengths("encoder_seq_lens", m.encoder_seq_lens);
  lengths("dcp_local_seq_lens", m.dcp_local_seq_lens);
  for (int r = 0; r < m.num_reqs && !m.dcp_local_seq_lens.empty(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    check::require(
        m.dcp_local_seq_lens[i] <= m.seq_lens[i], {kOp, "dcp_local_seq_lens"},
        [&] { return fmt::format("at most the request's {} keys", m.seq_lens[i]); },
        [&] { return fmt::format("{} at index {}", m.dcp_local_seq_lens[i], r); });
  }
  require_range<std::int32_t>("logits_indices", m.logits_indices,
                              static_cast<int>(m.logits_indices.size()), 0, m.num_tokens - 1);
}

template <typename T>
std::vector<T> prefix_of(const std::vector<T>& values, std::int64_t count) {
  const auto n = std::min(values.size(), static_cast<std::size_t>(count));
  return {values.begin(), values.begin() + static_cast<std::ptrdiff_t>(n)};
}

}  // namespace

std::vector<std::int32_t> CommonMetadata::key_start_loc() const {
  std::vector<std::int32_t> starts(static_cast<std::size_t>(num_reqs) + 1);
  std::int64_t sum = 0;
  for (std::size_t r = 0; r + 1 < starts.size(); ++r) {
    sum += seq_lens[r];
    check::require(sum <= INT32_MAX, {"CommonMetadata::key_start_loc", "seq_lens"},
                   "a sum below 2^31", [&] { return fmt::format("{} at index {}", sum, r); });
    starts[r + 1] = static_cast<std::int32_t>(sum);
  }
  return starts;
}

void CommonMetadata::validate(int block_size) const {
  validate_counts(*this);
  validate_queries(*this);
  validate_keys(*this);
  validate_block_table(*this, block_size);
  validate_slots(*this);
  validate_optional_fields(*this);
}

CommonMetadata CommonMetadata::unpadded(int tokens, int reqs) const {
  constexpr std::string_view kUnpadded = "CommonMetadata::unpadded";
  check::require(
      reqs >= 0 && reqs <= num_reqs, {kUnpadded, "reqs"},
      [&] { return fmt::format("a number from 0 to num_reqs {}", num_reqs); }, reqs);
  check::require(
      tokens >= 0 && tokens <= num_tokens, {kUnpadded, "tokens"},
      [&] { return fmt::format("a number from 0 to num_tokens {}", num_tokens); }, tokens);
  CommonMetadata m = *this;
  m.num_reqs = reqs;
  m.num_tokens = tokens;
  m.query_start_loc = prefix_of(query_start_loc, std::int64_t{reqs} + 1);
  m.seq_lens = prefix_of(seq_lens, reqs);
  if (block_table.defined()) m.block_table = block_table.slice(0, 0, reqs);
  m.slot_mapping = prefix_of(slot_mapping, tokens);
  m.request_causal = prefix_of(request_causal, reqs);
  m.is_prefilling = prefix_of(is_prefilling, reqs);
  m.positions = prefix_of(positions, tokens);
  m.encoder_seq_lens = prefix_of(encoder_seq_lens, reqs);
  m.dcp_local_seq_lens = prefix_of(dcp_local_seq_lens, reqs);
  std::erase_if(m.logits_indices, [&](std::int32_t t) { return t >= tokens; });
  return m;
}

}  // namespace attend

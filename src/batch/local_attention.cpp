// SPDX-License-Identifier: Apache-2.0
#include "attend/batch/local_attention.h"

#include <algorithm>
#include <utility>

#include "batch/require_causal.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "make_local_attention_virtual_batches";

/// Chunks first .. last of a request: those that its new tokens touch, or the last one that has
/// keys.
struct Chunks {
  int first = 0, last = 0;
};

Chunks chunks_of(const CommonMetadata& m, int request, int chunk_size) {
  const int seq_len = m.seq_lens[static_cast<std::size_t>(request)];
  const int last = seq_len == 0 ? 0 : (seq_len - 1) / chunk_size;
  return {std::min(m.num_computed_tokens(request) / chunk_size, last), last};
}

void check_arguments(int chunk_size, int block_size, const CommonMetadata& m) {
  check::require(block_size >= 1, {kOp, "block_size"}, "a number >= 1", block_size);
  check::require(
      chunk_size >= 1 && chunk_size % block_size == 0, {kOp, "chunk_size"},
      [&] { return fmt::format("a multiple of the block size {}", block_size); }, chunk_size);
  m.validate(block_size);
  require_causal(kOp, m);
  check::require(m.num_reqs == 0 || m.block_table.defined(), {kOp, "block_table"},
                 "the blocks of every request", "an undefined view");
  check::require(m.dcp_local_seq_lens.empty(), {kOp, "dcp_local_seq_lens"},
                 "nothing: chunks are not spread over ranks",
                 [&] { return fmt::format("{} entries", m.dcp_local_seq_lens.size()); });
  std::int64_t total = 0;
  for (int r = 0; r < m.num_reqs; ++r) {
    const Chunks c = chunks_of(m, r, chunk_size);
    total += c.last - c.first + 1;
  }
  check::require(total <= INT32_MAX, {kOp, "query_start_loc"}, "at most 2^31 - 1 virtual requests",
                 total);
}

/// Appends the virtual request of one chunk, without its blocks.
void append_chunk(LocalAttentionBatch& local, const CommonMetadata& m, int request,
                  std::int64_t begin, std::int64_t end) {
  CommonMetadata& v = local.common;
  const std::int64_t computed = m.num_computed_tokens(request);
  const auto query_len =
      static_cast<std::int32_t>(std::max<std::int64_t>(end - std::max(begin, computed), 0));
  const auto seq_len = static_cast<std::int32_t>(end - begin);
  v.query_start_loc.push_back(v.query_start_loc.back() + query_len);
  v.seq_lens.push_back(seq_len);
  v.max_query_len = std::max(v.max_query_len, query_len);
  v.max_seq_len = std::max(v.max_seq_len, seq_len);
  if (!m.is_prefilling.empty()) {
    v.is_prefilling.push_back(m.is_prefilling[static_cast<std::size_t>(request)]);
  }
  local.request_of.push_back(request);
  ++v.num_reqs;
}

}  // namespace

LocalAttentionBatch make_local_attention_virtual_batches(int chunk_size, int block_size,
                                                         const CommonMetadata& m) {
  check_arguments(chunk_size, block_size, m);
  LocalAttentionBatch local;
  CommonMetadata& v = local.common;
  v.query_start_loc = {0};
  v.num_tokens = m.num_tokens;
  CommonMetadata whole = m.unpadded(m.num_tokens, m.num_reqs);
  v.slot_mapping = std::move(whole.slot_mapping);
  v.positions = std::move(whole.positions);
  v.logits_indices = std::move(whole.logits_indices);

  const std::int64_t chunk_blocks = chunk_size / block_size;
  const std::int64_t columns =
      m.num_reqs == 0 ? 0 : std::clamp<std::int64_t>(m.block_table.shape[1], 1, chunk_blocks);
  for (int r = 0; r < m.num_reqs; ++r) {
    const Chunks chunks = chunks_of(m, r, chunk_size);
    const std::int64_t seq_len = m.seq_lens[static_cast<std::size_t>(r)];
    const auto* blocks = m.block_table.as<std::int32_t>() + r * m.block_table.strides[0];
    for (std::int64_t c = chunks.first; c <= chunks.last; ++c) {
      const std::int64_t begin = c * chunk_size;
      const std::int64_t end = std::min(begin + chunk_size, seq_len);
      append_chunk(local, m, r, begin, end);
      const std::int64_t used = (end - begin + block_size - 1) / block_size;
      for (std::int64_t i = 0; i < columns; ++i) {
        local.block_table.push_back(i < used ? blocks[c * chunk_blocks + i] : -1);
      }
    }
  }
  if (m.block_table.defined()) {
    v.block_table = ConstTensorView(local.block_table.data(), DType::i32, {v.num_reqs, columns});
  }
  return local;
}

}  // namespace attend

// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <vector>

#include "attend/dist/mla.h"
#include "attend/ops/mla_cache.h"
#include "core/check.h"
#include "dist/dcp/layout.h"
#include "dist/dcp/request_checks.h"
#include "dist/dcp/reserve.h"
#include "ops/mla_rows.h"

namespace attend {
namespace {

using dcp::RankBlocks;
using dcp::reserve;

constexpr std::string_view kOp = "dcp_gather_latents";

/// The rows that are wanted, checked.
struct Wanted {
  std::span<const std::int32_t> cu, starts;  ///< starts empty = all 0

  std::size_t requests() const noexcept { return cu.size() - 1; }
  std::int64_t rows() const noexcept { return cu.back(); }
  std::int64_t first(std::size_t r) const noexcept { return starts.empty() ? 0 : starts[r]; }
  std::int64_t end(std::size_t r) const noexcept { return first(r) + cu[r + 1] - cu[r]; }
};

/// What one rank has of them: local tokens [first[r], first[r] + cu[r + 1] - cu[r]) of request r.
struct Share {
  std::vector<std::int32_t> cu{0}, first;
};

/// Memory of one call; a thread reuses it.
struct Scratch {
  Buffer send, recv;
};
Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Wanted check_rows(const DcpGatherLatentsArgs& a) {
  Wanted w;
  const check::Where where{kOp, "cu_seq_lens"};
  w.cu = check::i32_array(where, a.cu_seq_lens, -1);
  check::require(!w.cu.empty() && w.cu[0] == 0, where, "entries from 0 on, one more than requests",
                 [&] { return w.cu.empty() ? "none" : fmt::format("{} at index 0", w.cu[0]); });
  for (std::size_t r = 0; r < w.requests(); ++r) {
    check::require(w.cu[r] <= w.cu[r + 1], where, "ascending entries", [&] {
      return fmt::format("{} then {} at index {}", w.cu[r], w.cu[r + 1], r + 1);
    });
  }
  check::require(
      w.rows() <= a.dst.shape[0], where,
      [&] { return fmt::format("at most {} rows, those of dst", a.dst.shape[0]); }, w.rows());
  if (!a.seq_starts.defined()) return w;
  const check::Where at{kOp, "seq_starts"};
  w.starts = check::i32_array(at, a.seq_starts, static_cast<std::int64_t>(w.requests()));
  for (std::size_t r = 0; r < w.requests(); ++r) {
    check::require(w.starts[r] >= 0, at, "numbers >= 0",
                   [&] { return fmt::format("{} at index {}", w.starts[r], r); });
  }
  return w;
}

Wanted check_args(const DcpGatherLatentsArgs& a, const RankBlocks& blocks) {
  mla_rows::require_cache(kOp, "src_cache", a.src_cache, {});
  const check::Where where{kOp, "dst"};
  check::tensor(where, a.dst, 2, {a.src_cache.dtype});
  check::shape(where, a.dst, {-1, a.src_cache.shape[2]});
  check::unit_last_stride(where, a.dst);
  check::distinct_elements(where, a.dst);
  const Wanted w = check_rows(a);
  dcp::check_blocks(kOp, "src_cache", blocks, static_cast<std::int64_t>(w.requests()));
  check::no_overlap(where, a.dst, "src_cache", a.src_cache);
  check::no_overlap(where, a.dst, "block_table", a.block_table);
  check::no_overlap(where, a.dst, "cu_seq_lens", a.cu_seq_lens);
  if (a.seq_starts.defined()) check::no_overlap(where, a.dst, "seq_starts", a.seq_starts);
  for (std::size_t r = 0; r < w.requests(); ++r) {
    dcp::check_positions(kOp, blocks, {static_cast<std::int64_t>(r), w.first(r), w.end(r)});
  }
  return w;
}

Share share_of(const Wanted& w, int rank, const DcpLayout& layout) {
  Share share;
  for (std::size_t r = 0; r < w.requests(); ++r) {
    const std::int64_t first = dcp::local_count(w.first(r), rank, layout);
    const std::int64_t count = dcp::local_count(w.end(r), rank, layout) - first;
    share.first.push_back(static_cast<std::int32_t>(first));
    share.cu.push_back(static_cast<std::int32_t>(share.cu.back() + count));
  }
  return share;
}

/// A contiguous i32 tensor over a vector.
ConstTensorView view_of(const std::vector<std::int32_t>& v) {
  return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
}

/// Copies rows [begin, end) of dst out of `gathered` [N, most, E], where each rank's rows lie one
/// after the other. As many at once as one rank has.
void order_rows(const DcpGatherLatentsArgs& a, const Wanted& w, const std::vector<Share>& shares,
                const TensorView& gathered, std::int64_t begin, std::int64_t end) {
  const DcpLayout layout{static_cast<int>(shares.size()), a.interleave};
  const auto item = static_cast<std::int64_t>(size_of(a.dst.dtype));
  const std::int64_t bytes = a.dst.shape[1] * item, step = a.dst.strides[0] * item;
  auto r = static_cast<std::size_t>(std::ranges::upper_bound(w.cu, begin) - w.cu.begin() - 1);
  for (std::int64_t row = begin; row < end;) {
    while (w.cu[r + 1] <= row) ++r;
    const std::int64_t position = w.first(r) + row - w.cu[r];
    const std::int64_t run =
        std::min({layout.interleave - position % layout.interleave, w.cu[r + 1] - row, end - row});
    const int rank = dcp::owner(position, layout);
    const Share& share = shares[static_cast<std::size_t>(rank)];
    const std::int64_t from_row = rank * gathered.shape[1] + share.cu[r] +
                                  dcp::local_index(position, layout) - share.first[r];
    const auto* from = gathered.as<std::byte>() + from_row * bytes;
    for (std::int64_t i = 0; i < run; ++i) {
      std::memcpy(a.dst.as<std::byte>() + (row + i) * step, from + i * bytes,
                  static_cast<std::size_t>(bytes));
    }
    row += run;
  }
}

}  // namespace

void dcp_gather_latents(const DcpGatherLatentsArgs& a, Communicator& comm, Executor* executor) {
  const RankBlocks blocks{a.src_cache, a.block_table, {comm.size(), a.interleave}, comm.rank()};
  const Wanted w = check_args(a, blocks);
  std::vector<Share> shares;
  std::int64_t most = 0;
  for (int rank = 0; rank < comm.size(); ++rank) {
    shares.push_back(share_of(w, rank, blocks.layout));
    most = std::max<std::int64_t>(most, shares.back().cu.back());
  }

  const std::int64_t dim = a.src_cache.shape[2];
  Scratch& scratch = thread_scratch();
  // An exchange has as many rows from each rank; those that a rank does not have are never read.
  const TensorView send = reserve(scratch.send, a.dst.dtype, {most, dim});
  const TensorView gathered = reserve(scratch.recv, a.dst.dtype, {comm.size(), most, dim});
  const Share& own = shares[static_cast<std::size_t>(comm.rank())];
  CpGatherCacheArgs g;
  g.src_cache = a.src_cache;
  g.dst = send;
  g.block_table = a.block_table;
  g.cu_seq_lens = view_of(own.cu);
  g.seq_starts = view_of(own.first);
  cp_gather_cache(g, executor);
  comm.all_gather(send, gathered);

  const std::int64_t bytes = w.rows() * dim * static_cast<std::int64_t>(size_of(a.dst.dtype));
  mla_rows::run(bytes <= mla_rows::kParallelCopyBytes, executor, [&](int worker, int workers) {
    order_rows(a, w, shares, gathered, w.rows() * worker / workers,
               w.rows() * (worker + 1) / workers);
  });
}

}  // namespace attend

// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "attend/core/error.h"
#include "attend/dist/decode_context_parallel.h"
#include "attend/dist/indexer.h"
#include "attend/ops/top_k.h"
#include "support/host_tensor.h"
#include "support/scale.h"

namespace attend {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;
using testing::HostTensor;
using testing::Rng;

using Ints = std::vector<std::int32_t>;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

ConstTensorView view(const Ints& v) {
  return {v.data(), DType::i32, {static_cast<std::int64_t>(v.size())}};
}

/// Logits of requests of several lengths, and what is chosen where one rank has all of them.
struct Whole {
  Whole(Rng& rng, const Ints& row_lengths, std::int64_t topk, int kind)
      : lengths(row_lengths),
        k(topk),
        rows(static_cast<std::int64_t>(lengths.size())),
        width(*std::ranges::max_element(lengths)),
        logits(DType::f32, {rows, std::max<std::int64_t>(width, 1)}),
        chosen(static_cast<std::size_t>(rows * k)) {
    for (float& x : logits.as<float>()) {
      x = kind == 0 ? rng.normal() : static_cast<float>(rng.integer(-2, 2));
      if (kind == 2 && rng.chance(0.4)) x = rng.chance(0.5) ? kNan : -0.0F;
    }
    const Ints starts(lengths.size());
    top_k_per_row_prefill(
        {logits, view(starts), view(lengths), TensorView(chosen.data(), DType::i32, {rows, k})});
  }

  Ints lengths;
  std::int64_t k, rows, width;
  HostTensor logits;
  Ints chosen;
};

/// What one rank has of it: its tokens' logits, `gap` columns further right.
struct Share {
  Share(const Whole& w, int rank, const DcpLayout& layout, std::int64_t gap)
      : logits(DType::f32, {w.rows, w.width + gap + 1}),
        starts(w.lengths.size(), static_cast<std::int32_t>(gap)),
        indices(w.chosen.size()) {
    logits.fill_bytes(0xFF);
    Ints ends(w.lengths.size());
    dcp_local_seq_lens(w.lengths, rank, layout, ends);
    for (std::int64_t t = 0; t < w.rows; ++t) {
      auto& end = ends[static_cast<std::size_t>(t)];
      for (std::int64_t l = 0; l < end; ++l) {
        const std::int64_t from = t * w.logits.view().shape[1] + dcp_position(l, rank, layout);
        const std::int64_t to = t * logits.view().shape[1] + gap + l;
        logits.as<float>()[static_cast<std::size_t>(to)] =
            w.logits.as<float>()[static_cast<std::size_t>(from)];
      }
      end += static_cast<std::int32_t>(gap);
    }
    top_k_per_row_prefill(
        {logits, view(starts), view(ends), TensorView(indices.data(), DType::i32, {w.rows, w.k})});
  }
  DcpTopKArgs args(const Whole& w, int interleave, Ints& out) const {
    DcpTopKArgs a;
    a.logits = logits;
    a.row_starts = view(starts);
    a.indices = {indices.data(), DType::i32, {w.rows, w.k}};
    a.out = {out.data(), DType::i32, {w.rows, w.k}};
    a.interleave = interleave;
    return a;
  }

  HostTensor logits;
  Ints starts, indices;
};

TEST(DcpTopK, IsTheChoiceOfOneRankOnEveryRank) {
  Rng rng(1);
  SCOPED_TRACE(rng.trace());
  const Ints lengths = {0, 1, 2, 7, 100, 64, testing::scaled(5000, 700)};
  for (const int kind : {0, 1, 2}) {
    for (const std::int64_t k : {1, 8, 300}) {
      const Whole whole(rng, lengths, k, kind);
      for (const int ranks : {1, 2, 3, 8}) {
        for (const int interleave : {1, 4, 64}) {
          run_in_process(ranks, [&](Communicator& comm) {
            const Share share(whole, comm.rank(), {ranks, interleave}, 3 * comm.rank());
            Ints out(whole.chosen.size(), 77);
            const auto pool = make_thread_pool(2);
            dcp_top_k(share.args(whole, interleave, out), comm, pool.get());
            EXPECT_EQ(out, whole.chosen)
                << "kind " << kind << ", k " << k << ", rank " << comm.rank() << " of " << ranks
                << ", interleave " << interleave;
          });
        }
      }
    }
  }
}

TEST(DcpTopK, RefusesBadInputBeforeItSendsOrWrites) {
  Rng rng(2);
  const Whole whole(rng, {6, 9}, 3, 0);
  run_in_process(1, [&](Communicator& comm) {
    Share share(whole, 0, {1, 1}, 0);
    Ints out(6, 77);
    const auto error = [&](auto&& change) -> std::string {
      auto args = share.args(whole, 1, out);
      change(args);
      try {
        dcp_top_k(args, comm);
      } catch (const InvalidArgument& e) {
        EXPECT_THAT(out, Each(77));
        return e.what();
      }
      return "none";
    };
    EXPECT_THAT(error([](auto& a) { a.interleave = 0; }), HasSubstr("'interleave'"));
    EXPECT_THAT(error([](auto& a) { a.logits.dtype = DType::bf16; }), HasSubstr("'logits'"));
    EXPECT_THAT(error([](auto& a) { a.indices.dtype = DType::i64; }), HasSubstr("'indices'"));
    EXPECT_THAT(error([](auto& a) { a.indices.shape[0] = 1; }), HasSubstr("'indices'"));
    EXPECT_THAT(error([](auto& a) { a.out.shape[1] = 2; }), HasSubstr("'out'"));
    EXPECT_THAT(error([&](auto& a) { a.out.data = share.indices.data(); }), HasSubstr("'out'"));
    EXPECT_THAT(error([](auto& a) { a.row_starts.shape[0] = 1; }), HasSubstr("'row_starts'"));
    share.starts[1] = -1;
    EXPECT_THAT(error([](auto&) {}), HasSubstr("'row_starts'"));
    share.starts[1] = 0;
    const Ints good = share.indices;
    const auto lowest = std::numeric_limits<std::int32_t>::min();
    const auto highest = std::numeric_limits<std::int32_t>::max();
    // Beyond the logits, not ascending, and after -1.
    for (const Ints& row : {Ints{0, 1, 10},
                            {0, 1, highest},
                            {0, 1, -2},
                            {lowest, 0, 1},
                            {1, 0, 2},
                            {1, 1, 2},
                            {0, -1, 2},
                            {-1, -1, 0}}) {
      std::ranges::copy(row, share.indices.begin() + 3);
      EXPECT_THAT(error([](auto&) {}), HasSubstr("'indices'")) << row[0] << " " << row[1];
    }
    share.indices = good;
    EXPECT_EQ(error([](auto&) {}), "none");
  });
}

TEST(DcpTopK, PositionsBeyondI32AreRefused) {
  // Token 5 of rank 2 would have position 2^31 + 5; the other ranks do not wait for it.
  const auto call = [](int ranks) {
    run_in_process(ranks, [](Communicator& comm) {
      const Ints indices = {5};
      const std::vector<float> logits(6);
      Ints out = {77};
      DcpTopKArgs a;
      a.logits = {logits.data(), DType::f32, {1, 6}};
      a.indices = {indices.data(), DType::i32, {1, 1}};
      a.out = {out.data(), DType::i32, {1, 1}};
      a.interleave = 1 << 30;
      dcp_top_k(a, comm);
      EXPECT_EQ(out[0], 5);
    });
  };
  EXPECT_NO_THROW(call(2));
  EXPECT_THROW(call(3), InvalidArgument);
}

}  // namespace
}  // namespace attend

// SPDX-License-Identifier: Apache-2.0
#include "attend/dist/communicator.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <numeric>
#include <thread>

#include "support/host_tensor.h"
#include "support/scale.h"

namespace attend {
namespace {

using testing::HostTensor;
using testing::Rng;

/// What rank r holds at index i.
std::int64_t value(int rank, std::int64_t i) { return 1000 * rank + i; }

HostTensor numbered(int rank, std::int64_t count) {
  HostTensor t(DType::i64, {count});
  for (std::int64_t i = 0; i < count; ++i) {
    t.as<std::int64_t>()[static_cast<std::size_t>(i)] = value(rank, i);
  }
  return t;
}

TEST(Communicator, MovesBlocksToTheirPlaces) {
  for (const int n : {1, 2, 3, 5, 8}) {
    for (const std::int64_t count : {0, 1, 7}) {
      run_in_process(n, [&](Communicator& c) {
        ASSERT_EQ(c.size(), n);
        const HostTensor own = numbered(c.rank(), count);
        HostTensor all(DType::i64, {n, count});
        c.all_gather(own, all);
        for (int r = 0; r < n; ++r) {
          for (std::int64_t i = 0; i < count; ++i) {
            EXPECT_EQ(testing::get(all.view(), {r, i}), static_cast<double>(value(r, i)));
          }
        }
        const HostTensor blocks = numbered(c.rank(), n * count);
        c.all_to_all(blocks, all);
        for (int r = 0; r < n; ++r) {
          for (std::int64_t i = 0; i < count; ++i) {
            EXPECT_EQ(testing::get(all.view(), {r, i}),
                      static_cast<double>(value(r, c.rank() * count + i)));
          }
        }
        for (int root = 0; root < n; ++root) {
          const HostTensor buffer = numbered(c.rank(), count);
          c.broadcast(buffer, root);
          EXPECT_EQ(buffer.snapshot(), numbered(root, count).snapshot());
        }
      });
    }
  }
}

TEST(Communicator, SmallTypesMoveBitForBit) {
  run_in_process(3, [](Communicator& c) {
    HostTensor own(DType::bf16, {5});
    own.fill_bytes(0xF0 + c.rank());  // NaN payloads must survive
    HostTensor all(DType::bf16, {15});
    c.all_gather(own, all);
    for (std::size_t i = 0; i < 15; ++i) {
      EXPECT_EQ(all.as<bf16>()[i].bits & 0xFF, 0xF0 + i / 5);
    }
  });
}

TEST(Communicator, SumsInRankOrderWhateverTheTiming) {
  constexpr std::int64_t kCount = 64;
  Rng rng(17);
  SCOPED_TRACE(rng.trace());
  for (const int n : {1, 2, 4, 7}) {
    const auto total_count = static_cast<std::size_t>(kCount * n);
    // Of very different sizes, so that another order of adding gives other bits.
    std::vector<std::vector<float>> values(static_cast<std::size_t>(n));
    for (auto& of_rank : values) {
      for (std::size_t i = 0; i < total_count; ++i) {
        of_rank.push_back(std::ldexp(rng.normal(), static_cast<int>(rng.integer(-6, 6))));
      }
    }
    std::vector<float> want = values.front();
    std::vector<float> backward = values.back();
    for (std::size_t r = 1; r < values.size(); ++r) {
      for (std::size_t i = 0; i < total_count; ++i) {
        want[i] += values[r][i];
        backward[i] += values[values.size() - 1 - r][i];
      }
    }
    // The data can tell orders apart.
    if (n > 2) {
      ASSERT_NE(want, backward);
    }
    for (int round = 0; round < testing::scaled(24, 6); ++round) {
      run_in_process(n, [&](Communicator& c) {
        // Other ranks are late in every round.
        std::this_thread::sleep_for(std::chrono::microseconds(((c.rank() + round) % n) * 300));
        const std::vector<float>& own = values[static_cast<std::size_t>(c.rank())];
        std::vector<float> sum(total_count, -1.0F);
        std::vector<float> block(kCount, -1.0F);
        c.all_reduce(ConstTensorView(own.data(), DType::f32, {n, kCount}),
                     TensorView(sum.data(), DType::f32, {n * kCount}));
        c.reduce_scatter(ConstTensorView(own.data(), DType::f32, {n * kCount}),
                         TensorView(block.data(), DType::f32, {kCount}));
        EXPECT_EQ(0, std::memcmp(sum.data(), want.data(), total_count * sizeof(float)));
        EXPECT_EQ(
            0, std::memcmp(block.data(), want.data() + c.rank() * kCount, kCount * sizeof(float)));
      });
    }
  }
}

TEST(Communicator, ManyCallsInARowDoNotMixUp) {
  run_in_process(4, [](Communicator& c) {
    for (int round = 0; round < testing::scaled(2000, 200); ++round) {
      // A fresh buffer each time: a rank that read too late would read freed memory.
      const auto own = std::make_unique<std::int32_t>(100 * round + c.rank());
      std::array<std::int32_t, 4> all{};
      c.all_gather(ConstTensorView(own.get(), DType::i32, {1}),
                   TensorView(all.data(), DType::i32, {4}));
      for (int r = 0; r < 4; ++r) {
        ASSERT_EQ(all[static_cast<std::size_t>(r)], 100 * round + r);
      }
    }
  });
}

TEST(Communicator, AbortReleasesTheRanksThatWait) {
  auto ranks = make_in_process_group(3);
  std::atomic<int> aborted{0};
  std::vector<std::thread> threads;
  for (const int r : {0, 2}) {
    threads.emplace_back([&, r] {
      float x = 1.0F;
      float sum = 0.0F;
      try {
        ranks[static_cast<std::size_t>(r)]->all_reduce(TensorView(&x, DType::f32, {1}),
                                                       TensorView(&sum, DType::f32, {1}));
      } catch (const CommunicatorAborted& e) {
        EXPECT_STREQ(e.what(), "[all_reduce] rank 1 has aborted the group");
        ++aborted;
      }
    });
  }
  ranks[1]->abort();
  for (auto& t : threads) t.join();
  EXPECT_EQ(aborted, 2);
  float x = 0.0F;
  EXPECT_THROW(ranks[1]->broadcast(TensorView(&x, DType::f32, {1}), 0), CommunicatorAborted);
}

TEST(Communicator, AbortAtAnyMomentEndsAllRanks) {
  for (int round = 0; round < testing::scaled(200, 20); ++round) {
    auto ranks = make_in_process_group(3);
    std::atomic<int> calls{0};
    std::vector<std::thread> threads;
    for (auto& rank : ranks) {
      threads.emplace_back([&calls, &c = *rank] {
        float x = 1.0F;
        float sum = 0.0F;
        const auto keep_calling = [&] {
          for (;; ++calls) c.all_reduce(TensorView(&x, DType::f32, {1}), {&sum, DType::f32, {1}});
        };
        EXPECT_THROW(keep_calling(), CommunicatorAborted);
      });
    }
    while (calls < 2 * round) std::this_thread::yield();
    ranks[static_cast<std::size_t>(round % 3)]->abort();
    for (auto& t : threads) t.join();
  }
}

TEST(Communicator, DestroyingARankReleasesTheOthers) {
  auto ranks = make_in_process_group(2);
  std::thread waits([&] {
    float x = 0.0F;
    EXPECT_THROW(ranks[0]->broadcast(TensorView(&x, DType::f32, {1}), 0), CommunicatorAborted);
  });
  ranks[1].reset();
  waits.join();
}

TEST(Communicator, ARankThatThrowsEndsTheRunWithItsException) {
  for (int round = 0; round < 20; ++round) {
    const auto body = [&](Communicator& c) {
      std::vector<float> own(8, 1.0F);
      std::vector<float> sum(8);
      for (int i = 0; i < 1000; ++i) {
        if (c.rank() == 2 && i == round) throw std::out_of_range("rank 2");
        c.all_reduce(TensorView(own.data(), DType::f32, {8}),
                     TensorView(sum.data(), DType::f32, {8}));
      }
    };
    EXPECT_THROW(run_in_process(4, body), std::out_of_range);
  }
  // A rank that returns too early is one that the others wait for in vain.
  const auto returns_early = [](Communicator& c) {
    float x = 0.0F;
    if (c.rank() == 0) c.broadcast(TensorView(&x, DType::f32, {1}), 0);
  };
  EXPECT_THROW(run_in_process(2, returns_early), CommunicatorAborted);
  // Nobody failed by itself here.
  const auto gives_up = [](Communicator& c) {
    float x = 0.0F;
    c.abort();
    c.broadcast(TensorView(&x, DType::f32, {1}), 0);
  };
  EXPECT_THROW(run_in_process(2, gives_up), CommunicatorAborted);
}

std::string what_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "nothing";
}

TEST(Communicator, CallsThatDifferFailInAllRanksAndLeaveTheGroupUsable) {
  run_in_process(3, [](Communicator& c) {
    std::vector<float> a(6, 1.0F), b(18, -1.0F);
    const auto view = [](std::vector<float>& v, std::int64_t n) {
      return TensorView(v.data(), DType::f32, {n});
    };
    const std::int64_t count = c.rank() == 1 ? 2 : 1;
    EXPECT_EQ(what_of([&] { c.all_gather(view(a, count), view(b, 3 * count)); }),
              "[all_gather] argument 'send': expected the call of rank 0 on all ranks, all_gather "
              "of 1 f32, got all_gather of 2 f32 on rank 1");
    EXPECT_NE(what_of([&] {
                if (c.rank() == 2) {
                  c.all_to_all(view(a, 3), view(b, 3));
                } else {
                  c.all_reduce(view(a, 1), view(b, 1));
                }
              }),
              "nothing");
    EXPECT_NE(what_of([&] { c.broadcast(view(b, 1), c.rank() == 0 ? 0 : 1); }), "nothing");
    for (const float x : b) EXPECT_EQ(x, -1.0F);
    c.all_reduce(view(a, 1), view(b, 1));
    EXPECT_EQ(b[0], 3.0F);
  });
}

TEST(Communicator, BadViewsAreRefusedWithoutTheOthers) {
  auto ranks = make_in_process_group(2);  // nobody answers for rank 1
  Communicator& c = *ranks[0];
  const auto blame = [](const std::function<void()>& call) -> std::string {
    try {
      call();
    } catch (const InvalidArgument& e) {
      return e.op() + " " + e.argument();
    }
    return "nothing";
  };
  HostTensor two(DType::f32, {2}), four(DType::f32, {4}), ints(DType::i32, {4}),
      odd(DType::f32, {3});
  TensorView gaps(four.view().data, DType::f32, {2});
  gaps.strides[0] = 2;
  EXPECT_EQ(blame([&] { c.all_gather(two, two); }), "all_gather recv");
  EXPECT_EQ(blame([&] { c.all_gather(two, ints); }), "all_gather recv");
  EXPECT_EQ(blame([&] { c.all_gather({}, four); }), "all_gather send");
  EXPECT_EQ(blame([&] { c.all_gather(gaps, four); }), "all_gather send");
  EXPECT_EQ(blame([&] { c.all_gather(four.view().slice(0, 0, 2), four); }), "all_gather recv");
  EXPECT_EQ(blame([&] { c.all_to_all(odd, odd); }), "all_to_all send");
  EXPECT_EQ(blame([&] { c.all_to_all(four, two); }), "all_to_all recv");
  EXPECT_EQ(blame([&] { c.reduce_scatter(ints, two); }), "reduce_scatter send");
  EXPECT_EQ(blame([&] { c.reduce_scatter(four, odd); }), "reduce_scatter recv");
  EXPECT_EQ(blame([&] { c.all_reduce(four, two); }), "all_reduce recv");
  EXPECT_EQ(blame([&] { c.broadcast(two, 2); }), "broadcast root");
  EXPECT_EQ(blame([&] { c.broadcast(two, -1); }), "broadcast root");
  EXPECT_EQ(blame([&] { c.broadcast(gaps, 0); }), "broadcast buffer");
  EXPECT_EQ(blame([] { make_in_process_group(0); }), "make_in_process_group size");
}

}  // namespace
}  // namespace attend

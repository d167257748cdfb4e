// SPDX-License-Identifier: Apache-2.0
#include "cache/first_touch.h"

#include <gmock/gmock.h>
#include <sched.h>

#include <mutex>

#include "core/affinity.h"

namespace attend::first_touch {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

NumaTopology two_nodes(std::vector<int> first, std::vector<int> second) {
  return {{{0, std::move(first), 1 << 30}, {1, std::move(second), 1 << 30}}, ""};
}

TEST(ChooseTargets, TakesNodesThatWorkersCanRunOn) {
  const std::vector<std::vector<int>> cpus = {{0, 1}, {2, 3}, {1, 2}};
  const auto targets = choose_targets(two_nodes({0, 1}, {2, 3}), cpus);
  ASSERT_THAT(targets, SizeIs(2));
  EXPECT_EQ(targets[0].node, 0);
  EXPECT_THAT(targets[0].workers, ElementsAre(0, 2));
  EXPECT_EQ(targets[1].node, 1);
  EXPECT_THAT(targets[1].workers, ElementsAre(1, 2));
}

TEST(ChooseTargets, LeavesOutNodesWithoutMemoryCpusOrWorkers) {
  const std::vector<std::vector<int>> cpus = {{0, 1, 2, 3, 4, 5}};
  NumaTopology t = two_nodes({0, 1}, {2, 3});
  t.nodes.push_back({2, {4, 5}, 0});
  t.nodes.push_back({3, {}, 1 << 30});
  t.nodes.push_back({4, {6, 7}, 1 << 30});
  ASSERT_THAT(choose_targets(t, cpus), SizeIs(2));
  EXPECT_EQ(choose_targets(t, cpus)[1].node, 1);
}

TEST(ChooseTargets, OneNodeIsNoChoice) {
  const std::vector<std::vector<int>> cpus = {{0, 1}, {}};
  EXPECT_THAT(choose_targets(two_nodes({0, 1}, {2, 3}), cpus), IsEmpty());
  EXPECT_THAT(choose_targets({{}, "unknown"}, cpus), IsEmpty());
}

// Where each page was touched, and how often.
struct Touched {
  std::vector<int> cpu, count;
  std::string problem;
  Touched(std::size_t pages, std::span<const Target> targets, Executor& executor)
      : cpu(pages, -1), count(pages) {
    std::mutex mutex;
    problem = touch_pages(pages, targets, executor, [&](std::size_t page) {
      const std::lock_guard lock(mutex);
      cpu[page] = sched_getcpu();
      ++count[page];
    });
  }
};

TEST(TouchPages, TouchesEveryPageOnce) {
  for (const int workers : {1, 2, 3}) {
    const auto pool = make_thread_pool(workers);
    const auto masks = worker_cpus(*pool);
    ASSERT_THAT(masks, SizeIs(workers));
    EXPECT_THAT(masks, Each(thread_cpus()));
    // Both nodes have this thread's CPUs: no real machine is so, but every one can play it.
    const auto targets = choose_targets(two_nodes(thread_cpus(), thread_cpus()), masks);
    for (const std::size_t pages : {0U, 1U, 2U, 7U, 64U}) {
      const Touched plain(pages, {}, *pool), spread(pages, targets, *pool);
      EXPECT_THAT(plain.count, Each(1));
      EXPECT_THAT(spread.count, Each(1));
      EXPECT_EQ(plain.problem + spread.problem, "");
    }
  }
}

TEST(TouchPages, PagesTakeTurnsOnTheNodesAndWorkersGetTheirMasksBack) {
  const std::vector<int> own = thread_cpus();
  if (own.size() < 2) GTEST_SKIP() << "needs two CPUs";
  for (const int workers : {1, 2, 3}) {
    const auto pool = make_thread_pool(workers);
    const auto targets = choose_targets(two_nodes({own[0]}, {own[1]}), worker_cpus(*pool));
    const Touched touched(9, targets, *pool);
    for (std::size_t page = 0; page < 9; ++page)
      EXPECT_EQ(touched.cpu[page], own[page % 2]) << page;
    EXPECT_EQ(touched.problem, "");
    EXPECT_THAT(worker_cpus(*pool), Each(own));
  }
}

TEST(TouchPages, SaysWhereAWorkerCannotGo) {
  const auto pool = make_thread_pool(2);
  constexpr int kNoSuchCpu = (1 << 16) - 1;
  const std::vector<Target> targets = {{0, {0, 1}, thread_cpus()}, {1, {1}, {kNoSuchCpu}}};
  const Touched touched(5, targets, *pool);
  EXPECT_THAT(touched.count, Each(1));
  EXPECT_EQ(touched.problem, "1 times a worker could not move to the CPUs of a node");
}

}  // namespace
}  // namespace attend::first_touch

// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "attend/core/error.h"
#include "attend/core/executor.h"

#if defined(__SANITIZE_THREAD__)
#define ATTEND_TEST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define ATTEND_TEST_TSAN 1
#endif
#endif

namespace attend {
namespace {

class ThreadPoolTest : public ::testing::TestWithParam<int> {};

TEST_P(ThreadPoolTest, CallsEveryWorkerOnceAndWaitsForAll) {
  const auto pool = make_thread_pool(GetParam());
  ASSERT_EQ(pool->num_workers(), GetParam());
  std::vector<int> calls(static_cast<std::size_t>(GetParam()));  // plain: run() must synchronise
  for (int round = 1; round <= 300; ++round) {
    pool->run([&](int worker) { ++calls[static_cast<std::size_t>(worker)]; });
    ASSERT_THAT(calls, ::testing::Each(round));
  }
}

TEST_P(ThreadPoolTest, TheCallerIsWorkerZero) {
  const auto pool = make_thread_pool(GetParam());
  std::vector<std::thread::id> ids(static_cast<std::size_t>(GetParam()));
  pool->run(
      [&](int worker) { ids[static_cast<std::size_t>(worker)] = std::this_thread::get_id(); });
  EXPECT_EQ(ids[0], std::this_thread::get_id());
  std::sort(ids.begin(), ids.end());
  EXPECT_EQ(std::adjacent_find(ids.begin(), ids.end()), ids.end());
}

TEST_P(ThreadPoolTest, WakesUpAfterSleeping) {
  const auto pool = make_thread_pool(GetParam());
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // longer than the spin
    std::atomic<int> calls = 0;
    pool->run([&](int worker) {
      if (worker != 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ++calls;
    });
    ASSERT_EQ(calls, GetParam());
  }
}

INSTANTIATE_TEST_SUITE_P(Workers, ThreadPoolTest, ::testing::Values(1, 2, 3, 8));

TEST(ThreadPoolConcurrencyTest, RunsFromSeveralThreadsAreSerialised) {
  const auto pool = make_thread_pool(3);
  int runs = 0;  // plain: the pool must order the runs
  std::atomic<int> calls = 0;
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      for (int k = 0; k < 200; ++k) {
        pool->run([&](int worker) {
          if (worker == 0) ++runs;
          ++calls;
        });
      }
    });
  }
  for (auto& t : callers) t.join();
  EXPECT_EQ(runs, 600);
  EXPECT_EQ(calls, 1800);
}

TEST(ThreadPoolErrorTest, RefusesBadCounts) {
  for (const int n : {0, -1, 1 << 20}) EXPECT_THROW(make_thread_pool(n), InvalidArgument) << n;
}

// Runs `child` in a fork and returns its exit status; a child that hangs is killed by its alarm.
int exit_status_of_child(FunctionRef<int()> child) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);
    _exit(child());
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

TEST(ThreadPoolForkTest, TheChildStartsItsOwnThreads) {
#if defined(ATTEND_TEST_TSAN)
  GTEST_SKIP() << "the thread sanitizer forbids threads after fork";
#endif
  auto pool = make_thread_pool(3);
  const auto count = [&] {
    std::atomic<int> calls = 0;
    pool->run([&](int) { ++calls; });
    return calls.load();
  };
  EXPECT_EQ(count(), 3);
  const int status = exit_status_of_child([&] {
    const int calls = count() + count();
    const int grandchild = exit_status_of_child([&] { return count(); });
    pool.reset();
    return calls * 10 + grandchild;
  });
  EXPECT_EQ(status, 63);
  EXPECT_EQ(count(), 3);
}

TEST(ThreadPoolForkTest, AnUnusedPoolCanBeDestroyedInTheChild) {
  auto pool = make_thread_pool(2);
  EXPECT_EQ(exit_status_of_child([&] {
              pool.reset();
              return 7;
            }),
            7);
}

TEST(DefaultExecutorTest, ReadsTheEnvironment) {
  const auto in_child = [](const char* value) {
    return exit_status_of_child([&] {
      setenv("ATTEND_NUM_THREADS", value, 1);
      try {
        return default_executor().num_workers();
      } catch (const InvalidArgument&) {
        return 100;
      }
    });
  };
#if !defined(ATTEND_TEST_TSAN)
  EXPECT_EQ(in_child("5"), 5);
#endif
  EXPECT_EQ(in_child("1"), 1);
  for (const char* bad : {"0", "-2", "two", "", "3x", "99999999999"}) {
    EXPECT_EQ(in_child(bad), 100) << bad;
  }
}

TEST(DefaultExecutorTest, IsOnePerProcess) { EXPECT_EQ(&default_executor(), &default_executor()); }

}  // namespace
}  // namespace attend

// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <pthread.h>

#include <atomic>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "attend/core/error.h"
#include "attend/core/executor.h"

namespace attend {
namespace {

using Task = FunctionRef<void(int worker)>;

constexpr int kMaxThreads = 4096;

void pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits until `value` differs from `old`: spins first, since the steps of a decode follow each
// other within microseconds and waking a sleeper costs more than that.
std::uint32_t wait_for_change(const std::atomic<std::uint32_t>& value, std::uint32_t old,
                              bool spin) noexcept {
  constexpr auto kSpinTime = std::chrono::microseconds(50);
  constexpr int kPausesPerClock = 32;
  std::uint32_t now = value.load(std::memory_order_acquire);
  if (now != old) return now;
  if (spin) {
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int i = 0; i < kPausesPerClock; ++i) {
        now = value.load(std::memory_order_acquire);
        if (now != old) return now;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
  }
  while ((now = value.load(std::memory_order_acquire)) == old) value.wait(old);
  return now;
}

// Signals of the host program are handled by its own threads.
class BlockSignals {
 public:
  BlockSignals() noexcept {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old_);
  }
  ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &old_, nullptr); }
  BlockSignals(const BlockSignals&) = delete;
  BlockSignals& operator=(const BlockSignals&) = delete;

 private:
  sigset_t old_;
};

// The threads of one pool in one process. fork() copies the memory but not the threads, so a child
// must build a new one and never touch the old (its mutex may be held by a thread that is gone).
class Team {
 public:
  Team(int num_workers, unsigned process)
      : process_(process), spin_(num_workers <= available_cpus()) {
    const BlockSignals block;
    threads_.reserve(static_cast<std::size_t>(num_workers) - 1);
    try {
      for (int worker = 1; worker < num_workers; ++worker) {
        threads_.emplace_back([this, worker] { work(worker); });
        pthread_setname_np(threads_.back().native_handle(), "attend");
      }
    } catch (const std::system_error& e) {
      const auto started = threads_.size();
      stop();
      throw DeviceError(fmt::format("cannot start thread {} of a pool of {}: {}", started + 1,
                                    num_workers, e.what()));
    }
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() { stop(); }

  unsigned process() const noexcept { return process_; }

  void run(Task task) noexcept {
    const std::lock_guard lock(run_mutex_);
    task_ = &task;
    busy_.store(static_cast<std::uint32_t>(threads_.size()), std::memory_order_relaxed);
    announce();
    task(0);
    std::uint32_t busy = busy_.load(std::memory_order_acquire);
    while (busy != 0) busy = wait_for_change(busy_, busy, spin_);
  }

  Team* next_abandoned = nullptr;

 private:
  void announce() noexcept {
    generation_.fetch_add(1);  // sequentially consistent: orders with the sleepers' count
    generation_.notify_all();
  }

  void stop() noexcept {
    stopping_ = true;
    announce();
    for (std::thread& t : threads_) t.join();
    threads_.clear();
  }

  void work(int worker) noexcept {
    std::uint32_t seen = 0;
    while (true) {
      seen = wait_for_change(generation_, seen, spin_);
      if (stopping_) return;
      (*task_)(worker);
      if (busy_.fetch_sub(1) == 1) busy_.notify_one();
    }
  }

  const unsigned process_;
  const bool spin_;
  std::mutex run_mutex_;
  const Task* task_ = nullptr;  // written before announce(), read after it
  bool stopping_ = false;       // likewise
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  alignas(64) std::atomic<std::uint32_t> busy_{0};
  std::vector<std::thread> threads_;
};

std::atomic<unsigned> current_process{0};  // counts forks along the line to this process
std::atomic<Team*> abandoned_teams{nullptr};

void watch_forks() {
  static const int result = pthread_atfork(
      nullptr, nullptr, [] { current_process.fetch_add(1, std::memory_order_relaxed); });
  if (result != 0) throw DeviceError(fmt::format("pthread_atfork failed with error {}", result));
}

// Destroying a team of the parent would join threads that do not exist here. It stays reachable, so
// that leak checkers see that it is kept on purpose.
void abandon(Team* team) noexcept {
  team->next_abandoned = abandoned_teams.load(std::memory_order_relaxed);
  while (!abandoned_teams.compare_exchange_weak(team->next_abandoned, team)) {
  }
}

class ThreadPool final : public Executor {
 public:
  explicit ThreadPool(int num_workers) : num_workers_(num_workers) {
    if (num_workers_ == 1) return;
    watch_forks();
    team_.store(new Team(num_workers_, current_process.load()), std::memory_order_release);
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() override {
    Team* team = team_.load(std::memory_order_acquire);
    if (team == nullptr) return;
    if (team->process() == current_process.load()) {
      delete team;
    } else {
      abandon(team);
    }
  }

  int num_workers() const noexcept override { return num_workers_; }

  void run(Task task) override {
    if (num_workers_ == 1) {
      task(0);
      return;
    }
    Team* team = team_.load(std::memory_order_acquire);
    if (team->process() != current_process.load(std::memory_order_relaxed)) team = renew(team);
    team->run(task);
  }

 private:
  // Several threads of the child may come here at once: one wins.
  Team* renew(Team* old) {
    auto fresh = std::make_unique<Team>(num_workers_, current_process.load());
    if (!team_.compare_exchange_strong(old, fresh.get(), std::memory_order_acq_rel)) return old;
    abandon(old);
    return fresh.release();
  }

  const int num_workers_;
  std::atomic<Team*> team_{nullptr};
};

int default_num_threads() {
  const char* text = std::getenv("ATTEND_NUM_THREADS");
  if (text == nullptr) return available_cpus();
  const std::string_view value(text);
  int threads = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), threads);
  if (error != std::errc{} || end != value.data() + value.size() || threads < 1 ||
      threads > kMaxThreads) {
    throw InvalidArgument("default_executor", "ATTEND_NUM_THREADS",
                          fmt::format("an integer from 1 to {}", kMaxThreads),
                          fmt::format("'{}'", value));
  }
  return threads;
}

}  // namespace

std::unique_ptr<Executor> make_thread_pool(int num_threads) {
  if (num_threads < 1 || num_threads > kMaxThreads) {
    throw InvalidArgument("make_thread_pool", "num_threads",
                          fmt::format("an integer from 1 to {}", kMaxThreads),
                          fmt::to_string(num_threads));
  }
  return std::make_unique<ThreadPool>(num_threads);
}

Executor& default_executor() {
  // Never destroyed: other static objects may still use it while the process ends.
  static Executor* const pool = make_thread_pool(default_num_threads()).release();
  return *pool;
}

}  // namespace attend

// SPDX-License-Identifier: Apache-2.0
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>

#include "attend/dist/communicator.h"
#include "core/check.h"

namespace attend {
namespace {

std::string describe(const CollectiveCall& c) {
  std::string text =
      fmt::format("{} of {} {}", to_string(c.kind), c.count, attend::to_string(c.dtype));
  if (c.kind == Collective::broadcast) text += fmt::format(" from rank {}", c.root);
  return text;
}

bool same_call(const CollectiveCall& a, const CollectiveCall& b) noexcept {
  return a.kind == b.kind && a.dtype == b.dtype && a.count == b.count && a.root == b.root;
}

/// What the ranks share. A call has three parts: enter() publishes what this rank brings and waits
/// for all others; then every rank reads what it needs from the others' memory; leave() waits until
/// nobody reads any more. Only enter() can fail, so that no memory goes away under a reader.
class Group {
 public:
  explicit Group(int size) : calls_(static_cast<std::size_t>(size)) {}

  int size() const noexcept { return static_cast<int>(calls_.size()); }

  void run(int rank, const CollectiveCall& call) {
    enter(rank, call);
    // All ranks see the same calls and so come to the same verdict.
    const int odd_one = first_different();
    const CollectiveCall odd = calls_[static_cast<std::size_t>(odd_one)];
    const CollectiveCall first = calls_[0];
    if (odd_one == 0) transfer(rank, call);
    leave();
    check::require(
        odd_one == 0,
        {to_string(call.kind), call.kind == Collective::broadcast ? "buffer" : "send"},
        [&] { return fmt::format("the call of rank 0 on all ranks, {}", describe(first)); },
        [&] { return fmt::format("{} on rank {}", describe(odd), odd_one); });
  }

  void abort(int rank) noexcept {
    const std::lock_guard lock(mutex_);
    if (!aborted_by_) aborted_by_ = rank;
    changed_.notify_all();
  }

 private:
  void enter(int rank, const CollectiveCall& call) {
    std::unique_lock lock(mutex_);
    if (aborted_by_) throw_aborted(call);
    calls_[static_cast<std::size_t>(rank)] = call;
    if (++arrived_ == size()) {
      arrived_ = 0;
      inside_ = size();
      ++generation_;
      changed_.notify_all();
      return;
    }
    const std::uint64_t mine = generation_;
    changed_.wait(lock, [&] { return generation_ != mine || aborted_by_; });
    // A call that everybody has entered goes on, even if a rank has given up since.
    if (generation_ == mine) throw_aborted(call);
  }

  void leave() noexcept {
    std::unique_lock lock(mutex_);
    if (--inside_ == 0) {
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return inside_ == 0; });
    }
  }

  [[noreturn]] void throw_aborted(const CollectiveCall& call) const {
    throw CommunicatorAborted(
        fmt::format("[{}] rank {} has aborted the group", to_string(call.kind), *aborted_by_));
  }

  /// Lowest rank whose call differs from that of rank 0; 0 if none does. Between enter and leave.
  int first_different() const noexcept {
    for (int r = 1; r < size(); ++r) {
      if (!same_call(calls_[static_cast<std::size_t>(r)], calls_[0])) return r;
    }
    return 0;
  }

  void copy(void* to, std::int64_t to_block, int from_rank, std::int64_t from_block,
            const CollectiveCall& call) const noexcept {
    const auto bytes = call.count * static_cast<std::int64_t>(size_of(call.dtype));
    if (bytes == 0) return;
    const void* from = calls_[static_cast<std::size_t>(from_rank)].send;
    std::memcpy(static_cast<std::byte*>(to) + to_block * bytes,
                static_cast<const std::byte*>(from) + from_block * bytes,
                static_cast<std::size_t>(bytes));
  }

  void sum(const CollectiveCall& call, std::int64_t block) const noexcept {
    copy(call.recv, 0, 0, block, call);
    auto* total = static_cast<float*>(call.recv);
    for (std::size_t r = 1; r < calls_.size(); ++r) {
      const float* more = static_cast<const float*>(calls_[r].send) + block * call.count;
      for (std::int64_t i = 0; i < call.count; ++i) total[i] += more[i];
    }
  }

  void transfer(int rank, const CollectiveCall& call) const noexcept {
    switch (call.kind) {
      case Collective::all_gather:
        for (int r = 0; r < size(); ++r) copy(call.recv, r, r, 0, call);
        break;
      case Collective::all_to_all:
        for (int r = 0; r < size(); ++r) copy(call.recv, r, r, rank, call);
        break;
      case Collective::reduce_scatter:
        sum(call, rank);
        break;
      case Collective::all_reduce:
        sum(call, 0);
        break;
      case Collective::broadcast:
        if (rank != call.root) copy(call.recv, 0, call.root, 0, call);
        break;
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<CollectiveCall> calls_;  ///< a rank's own is written under the mutex, in enter()
  int arrived_ = 0;                    ///< ranks that wait in enter()
  int inside_ = 0;                     ///< ranks that may still read other ranks' memory
  std::uint64_t generation_ = 0;       ///< calls that all ranks have entered
  std::optional<int> aborted_by_;
};

class InProcessCommunicator final : public Communicator {
 public:
  InProcessCommunicator(std::shared_ptr<Group> group, int rank)
      : group_(std::move(group)), rank_(rank) {}
  InProcessCommunicator(const InProcessCommunicator&) = delete;
  InProcessCommunicator& operator=(const InProcessCommunicator&) = delete;
  ~InProcessCommunicator() override { group_->abort(rank_); }

  int rank() const noexcept override { return rank_; }
  int size() const noexcept override { return group_->size(); }
  void abort() noexcept override { group_->abort(rank_); }

 protected:
  void run(const CollectiveCall& call) override { group_->run(rank_, call); }

 private:
  std::shared_ptr<Group> group_;
  int rank_;
};

/// How a rank of run_in_process ended.
struct Ending {
  std::exception_ptr own;      ///< failed by itself
  std::exception_ptr aborted;  ///< gave up because another one did
};

void run_rank(Communicator& communicator, FunctionRef<void(Communicator&)> body,
              Ending& ending) noexcept {
  try {
    body(communicator);
  } catch (const CommunicatorAborted&) {
    ending.aborted = std::current_exception();
  } catch (...) {
    ending.own = std::current_exception();
  }
  // After an orderly end nobody waits for this rank; whoever does would wait for ever.
  communicator.abort();
}

}  // namespace

std::vector<std::unique_ptr<Communicator>> make_in_process_group(int size) {
  check::require(size >= 1, {"make_in_process_group", "size"}, "at least 1 rank", size);
  const auto group = std::make_shared<Group>(size);
  std::vector<std::unique_ptr<Communicator>> ranks;
  for (int r = 0; r < size; ++r) {
    ranks.push_back(std::make_unique<InProcessCommunicator>(group, r));
  }
  return ranks;
}

void run_in_process(int size, FunctionRef<void(Communicator&)> body) {
  const auto ranks = make_in_process_group(size);
  std::vector<Ending> endings(ranks.size());
  std::vector<std::thread> threads;
  threads.reserve(ranks.size());
  std::optional<std::string> not_started;
  try {
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      threads.emplace_back(run_rank, std::ref(*ranks[r]), body, std::ref(endings[r]));
    }
  } catch (const std::system_error& e) {
    not_started = e.what();
    ranks[threads.size()]->abort();
  }
  for (std::thread& t : threads) t.join();
  if (not_started) {
    throw DeviceError(
        fmt::format("cannot start a thread for each of {} ranks: {}", size, *not_started));
  }
  for (const Ending& e : endings) {
    if (e.own) std::rethrow_exception(e.own);
  }
  for (const Ending& e : endings) {
    if (e.aborted) std::rethrow_exception(e.aborted);
  }
}

}  // namespace attend

// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <type_traits>
#include <utility>

namespace attend {

/// Non-owning reference to a callable; valid only while the callable lives.
template <typename Signature>
class FunctionRef;
template <typename R, typename... Args>
class FunctionRef<R(Args...)> {
 public:
  template <typename F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>)
  FunctionRef(F&& f) noexcept  // NOLINT(google-explicit-constructor)
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* o, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(o))(std::forward<Args>(args)...);
        }) {}
  R operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

/// Runs a function on several workers at once. Callers may implement it over their own threads.
class Executor {
 public:
  virtual ~Executor() = default;
  /// Number of workers, >= 1, constant over the executor's life.
  virtual int num_workers() const noexcept = 0;
  /// Calls `task(worker)` once for each worker in [0, num_workers()), possibly at the same time,
  /// and returns when all have returned. `task` must not throw. Calls from several threads are
  /// serialised by the implementation; a call from inside a task is not allowed.
  virtual void run(FunctionRef<void(int worker)> task) = 0;
};

/// CPUs this process may use: the affinity mask, capped by the cgroup CPU quota; >= 1.
int available_cpus() noexcept;

/// A fork-join pool of `num_threads` workers (the caller is one of them). Survives fork(): the
/// child starts threads of its own on first use. @throws InvalidArgument unless num_threads >= 1.
std::unique_ptr<Executor> make_thread_pool(int num_threads);

/// Process-wide pool with `available_cpus()` workers, or ATTEND_NUM_THREADS if that is set;
/// made on first use.
Executor& default_executor();

}  // namespace attend

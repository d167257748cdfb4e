// SPDX-License-Identifier: Apache-2.0
#include "executors.h"

#include <nanobind/stl/optional.h>

#include <map>

#include "torch.h"

namespace attend::python {
namespace {

std::optional<int>& chosen() noexcept {
  static std::optional<int> threads;
  return threads;
}

/// One pool for each number of threads that was asked for. Never destroyed: daemon threads of
/// Python may still be inside a call when the process ends.
Executor& pool_of(int threads) {
  static auto& pools = *new std::map<int, std::unique_ptr<Executor>>;
  std::unique_ptr<Executor>& pool = pools[threads];
  if (pool == nullptr) pool = make_thread_pool(threads);
  return *pool;
}

}  // namespace

std::optional<int> num_threads() noexcept { return chosen(); }

void set_num_threads(std::optional<int> n) {
  if (n && *n < 1)
    throw InvalidArgument("set_num_threads", "n", "a number >= 1, or None", std::to_string(*n));
  chosen() = n;
}

Executor& executor_with(int num_workers) {
  Executor& usual = default_executor();
  return usual.num_workers() == num_workers ? usual : pool_of(num_workers);
}

Executor& executor_for(Framework framework) {
  if (chosen()) return pool_of(*chosen());
  if (framework == Framework::torch) return pool_of(torch_num_threads());
  return default_executor();
}

void bind_executors(nb::module_& m) {
  nb::class_<ThreadPool>(
      m, "ThreadPool",
      "Threads of the caller's own, for the `executor` argument of every function.")
      .def(nb::init<int>(), nb::arg("num_threads"))
      .def_prop_ro("num_threads",
                   [](const ThreadPool& pool) { return pool.executor().num_workers(); });
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, nb::arg("n").none());
  m.def("available_cpus", &available_cpus);
}

}  // namespace attend::python

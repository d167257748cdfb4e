// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <optional>

#include "attend/core/executor.h"
#include "border.h"

/// Which threads a call from Python runs on.
namespace attend::python {

/// attend.ThreadPool: threads of the caller's own.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads) : executor_(make_thread_pool(num_threads)) {}
  Executor& executor() const noexcept { return *executor_; }

 private:
  std::unique_ptr<Executor> executor_;
};

/// Threads of calls that name no pool; nullopt = those of the framework.
std::optional<int> num_threads() noexcept;
/// @throws InvalidArgument below 1.
void set_num_threads(std::optional<int> n);

/// The pool for a call without one of its own: of set_num_threads(), else with tensors of torch
/// that of torch.get_num_threads(), else default_executor(). Needs the GIL.
Executor& executor_for(Framework framework);

/// The pool of that many threads for calls that name none.
Executor& executor_with(int num_workers);

void bind_executors(nb::module_& m);

}  // namespace attend::python

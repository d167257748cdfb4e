// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <atomic>
#include <memory>
#include <optional>

#include "arguments.h"
#include "attend/backend/backend.h"
#include "attend/core/workspace.h"

/// Metadata that Python has, and calls of layers with it.
namespace attend::python {

inline constexpr const char* kMetadata = "attend.backends.Metadata of the back end";

/// Metadata with everything that it points to. Members are destroyed from the last to the first.
struct Built {
  nb::object builder;
  nb::object block_table_owner;  ///< a Batch or a tensor
  Imports imports;
  int num_workers = 1;
  /// Layers that run with it, or with copies that share its plan.
  std::shared_ptr<std::atomic<int>> running;
  std::unique_ptr<Metadata> metadata;
};

/// Counts a call of a layer.
class Running {
 public:
  explicit Running(Built* built) : built_(built) {
    if (built_ != nullptr) ++*built_->running;
  }
  ~Running() {
    if (built_ != nullptr) --*built_->running;
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  Built* built_;
};

/// What the calling thread's layers use if they are given none; grows as needed.
Workspace workspace_of_thread(std::size_t bytes);

/// The argument `workspace`; nothing = the thread's own.
std::optional<Workspace> read_workspace(Arguments& call);

/// Takes `metadata` (nothing = a profiling run), `workspace` and `executor`, and calls
/// body(const Metadata*, Executor&, Workspace) without the GIL. bytes(const Metadata&) is what the
/// body needs. Without executor it runs on as many threads as the plan was made for.
template <typename Bytes, typename Body>
void run_with_metadata(Arguments& call, Bytes&& bytes, Body&& body) {
  const std::optional<Workspace> workspace = read_workspace(call);
  Built* built = nullptr;
  const nb::handle object = call.object("metadata");
  if (object.is_valid() && !nb::try_cast(object, built))
    call.refuse_type("metadata", kMetadata, object);
  const Metadata* metadata = built == nullptr ? nullptr : built->metadata.get();
  const std::size_t needed = workspace || metadata == nullptr ? 0 : bytes(*metadata);
  const Running running(built);
  const auto task = [&](Executor& e) {
    body(metadata, e, workspace ? *workspace : workspace_of_thread(needed));
  };
  if (built == nullptr || call.object("executor").is_valid()) {
    call.run(task);
  } else {
    Executor& executor = executor_with(built->num_workers);
    call.done();
    const nb::gil_scoped_release without_gil;
    task(executor);
  }
}

}  // namespace attend::python

// SPDX-License-Identifier: Apache-2.0
#include "run_with_metadata.h"

namespace attend::python {

Workspace workspace_of_thread(std::size_t bytes) {
  thread_local Buffer buffer;
  buffer.reserve(bytes);
  return buffer.workspace();
}

std::optional<Workspace> read_workspace(Arguments& call) {
  const TensorView t = call.out("workspace");
  if (!t.defined()) return std::nullopt;
  if (!t.is_contiguous()) call.refuse("workspace", "contiguous memory", describe(t));
  return Workspace{t.data, static_cast<std::size_t>(t.numel()) * size_of(t.dtype)};
}

}  // namespace attend::python

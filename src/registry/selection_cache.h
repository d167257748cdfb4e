// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <mutex>
#include <unordered_map>

#include "attend/backend/selector.h"
#include "attend/core/executor.h"

namespace attend {

struct AttentionConfigHash {
  std::size_t operator()(const AttentionConfig& config) const noexcept;
};

/// Remembers the answer for each configuration; any thread may ask.
class SelectionCache {
 public:
  /// A process asks for a handful of configurations; the bound only keeps a search over thousands
  /// of them from growing without end.
  static constexpr std::size_t kMaxEntries = 1024;

  /// The remembered answer, or that of `compute`, which runs outside the lock.
  Selection get(const AttentionConfig& config,
                FunctionRef<Selection(const AttentionConfig&)> compute);
  std::size_t size() const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<AttentionConfig, Selection, AttentionConfigHash> entries_;
};

}  // namespace attend

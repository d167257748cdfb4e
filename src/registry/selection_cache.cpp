// SPDX-License-Identifier: Apache-2.0
#include "registry/selection_cache.h"

#include <cstdint>
#include <functional>
#include <string>

namespace attend {

std::size_t AttentionConfigHash::operator()(const AttentionConfig& c) const noexcept {
  std::uint64_t flags = 0;
  for (const bool flag : {c.use_mla, c.has_sink, c.use_sparse, c.use_differential, c.use_mm_prefix,
                          c.use_per_head_quant_scales, c.use_non_causal, c.use_alibi_sqrt,
                          c.batch_invariant, c.use_kv_connector}) {
    flags = flags << 1 | static_cast<std::uint64_t>(flag);
  }
  std::uint64_t hash = flags;
  const auto mix = [&hash](std::uint64_t value) {
    hash = (hash ^ value) * 0x9E3779B97F4A7C15U;
    hash ^= hash >> 29;
  };
  mix(static_cast<std::uint64_t>(c.platform.type));
  mix(static_cast<std::uint64_t>(c.platform.capability()));
  mix(std::hash<std::string>{}(c.platform.arch));
  mix(static_cast<std::uint64_t>(c.head_size));
  mix(static_cast<std::uint64_t>(c.dtype));
  mix(std::hash<std::string>{}(c.kv_cache_dtype));
  mix(static_cast<std::uint64_t>(c.block_size.value_or(-1)));
  mix(static_cast<std::uint64_t>(c.attn_type));
  return static_cast<std::size_t>(hash);
}

Selection SelectionCache::get(const AttentionConfig& config,
                              FunctionRef<Selection(const AttentionConfig&)> compute) {
  {
    const std::lock_guard lock(mutex_);
    if (const auto it = entries_.find(config); it != entries_.end()) return it->second;
  }
  Selection selection = compute(config);
  const std::lock_guard lock(mutex_);
  if (entries_.size() >= kMaxEntries) entries_.clear();
  entries_.emplace(config, selection);
  return selection;
}

std::size_t SelectionCache::size() const {
  const std::lock_guard lock(mutex_);
  return entries_.size();
}

}  // namespace attend

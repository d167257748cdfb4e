// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>

#include "attend/core/workspace.h"

namespace attend::flash_attn {

/// Where the int8 levels keep the codes and scales of a step's queries, keys and values, behind the
/// plan's part of the workspace.
class Int8Scratch {
 public:
  struct Heads {
    int num_q_heads, num_kv_heads, head_size;
  };
  Int8Scratch() = default;
  Int8Scratch(std::int64_t num_tokens, std::int64_t num_new_keys, const Heads& heads) noexcept {
    const std::int64_t d = heads.head_size;
    q_scale_ = take(num_tokens * heads.num_q_heads * d);
    k_codes_ = take(num_tokens * heads.num_q_heads * 4);
    k_scale_ = take(num_new_keys * heads.num_kv_heads * d);
    v_codes_ = take(num_new_keys * heads.num_kv_heads * 4);
    take(num_new_keys * heads.num_kv_heads * d);
    end_ += kAlignment;  // the plan's part may end anywhere
  }

  std::size_t bytes() const noexcept { return static_cast<std::size_t>(end_); }

  /// Addresses in a workspace whose first `plan_bytes` are the plan's.
  struct Views {
    void *q_codes, *q_scale, *k_codes, *k_scale, *v_codes;
  };
  Views at(Workspace workspace, std::size_t plan_bytes) const noexcept {
    const auto begin = reinterpret_cast<std::uintptr_t>(workspace.data) + plan_bytes;
    auto* base = static_cast<std::byte*>(workspace.data) + plan_bytes +
                 (kAlignment - begin % kAlignment) % kAlignment;
    return {base, base + q_scale_, base + k_codes_, base + k_scale_, base + v_codes_};
  }

 private:
  static constexpr std::int64_t kAlignment = 64;

  /// Adds `size` bytes and returns where the next part begins.
  std::int64_t take(std::int64_t size) noexcept {
    return end_ += (size + kAlignment - 1) / kAlignment * kAlignment;
  }

  std::int64_t q_scale_ = 0, k_codes_ = 0, k_scale_ = 0, v_codes_ = 0, end_ = 0;
};

}  // namespace attend::flash_attn

// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace attend {

/// Sizes of multi-head latent attention (MLA), in elements: every one > 0, and a multiple of 8
/// except where an op says otherwise. DeepSeek-V2, V3 and R1 have 512, 128, 64, 128.
struct MlaDims {
  int kv_lora_rank = 0;      ///< L: the latent that keys and values of all heads come from
  int qk_nope_head_dim = 0;  ///< P: part of a head's query and key without position
  int qk_rope_head_dim = 0;  ///< R: part with rotary position; its key is one for all heads
  int v_head_dim = 0;        ///< V: a head's value

  /// A row of the cache: the latent, then the rotated key.
  constexpr int cache_dim() const noexcept { return kv_lora_rank + qk_rope_head_dim; }
  /// A head's query and key in prefill.
  constexpr int qk_head_dim() const noexcept { return qk_nope_head_dim + qk_rope_head_dim; }
  friend bool operator==(const MlaDims&, const MlaDims&) = default;
};

}  // namespace attend

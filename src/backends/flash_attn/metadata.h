// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "backends/common/attention_metadata.h"
#include "backends/flash_attn/int8_scratch.h"

namespace attend::flash_attn {

/// What the builder makes of one batch.
struct FlashAttnMetadata final : AttentionMetadata {
  KvFormat format = KvFormat::plain;
  Int8Scratch int8_scratch;  ///< of the int8 levels

  std::size_t workspace_bytes() const noexcept override {
    return AttentionMetadata::workspace_bytes() + int8_scratch.bytes();
  }
};

}  // namespace attend::flash_attn

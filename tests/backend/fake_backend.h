// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "attend/backend/backend.h"

namespace attend::testing {

/// A back end with whatever capability a test wants; it cannot run.
class FakeBackend final : public Backend {
 public:
  explicit FakeBackend(std::string name, Capability can = {},
                       std::optional<std::string> combination = std::nullopt)
      : name_(std::move(name)), can_(std::move(can)), combination_(std::move(combination)) {}
  std::string_view name() const noexcept override { return name_; }
  const Capability& capability() const noexcept override { return can_; }
  std::vector<std::int64_t> kv_cache_shape(const KvCacheSpec&) const override { return {}; }
  std::vector<int> kv_cache_stride_order(KvLayout, bool, KvFormat) const override { return {}; }
  int kv_cache_block_dim() const noexcept override { return 0; }
  std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig&) const override {
    return nullptr;
  }
  std::unique_ptr<Impl> make_impl(const ImplConfig&) const override { return nullptr; }

 protected:
  std::optional<std::string> supports_combination(const AttentionConfig&) const override {
    return combination_;
  }

 private:
  std::string name_;
  Capability can_;
  std::optional<std::string> combination_;
};

/// A configuration that FLASH_ATTN serves.
inline AttentionConfig plain_config(std::string_view platform = "cpu") {
  AttentionConfig config;
  config.platform = Platform::parse(platform);
  config.head_size = 128;
  return config;
}

}  // namespace attend::testing

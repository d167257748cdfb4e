// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <string_view>

#include "attend/backend/backend.h"

namespace attend::differential {

inline constexpr int kHeadSizeMultiple = 8;
inline constexpr int kBlockSizeMultiple = 16;

/// The one instance; src/registry declares it too, from the list of components.
const Backend& backend() noexcept;

/// @throws InvalidArgument naming the field of `config` that is out of range; Unsupported for fast
/// arithmetic.
std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config);
/// @throws InvalidArgument naming the field of `config` that is out of range.
std::unique_ptr<Impl> make_impl(const ImplConfig& config);

/// Checks that both makers share. `op` is the name in the error.
void check_heads(std::string_view op, DifferentialVariant variant, int num_q_heads,
                 int num_kv_heads, int head_size);
void check_block_size(std::string_view op, int block_size);

}  // namespace attend::differential

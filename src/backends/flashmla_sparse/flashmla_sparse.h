// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <string_view>

#include "attend/backend/backend.h"

namespace attend::flashmla_sparse {

/// FlashMLA's page. The ops would take any.
inline constexpr int kBlockSizeMultiple = 64;

/// The one instance; src/registry declares it too, from the list of components.
const Backend& backend() noexcept;

/// @throws InvalidArgument naming the field of `config` that is out of range; Unsupported for its
/// arithmetic.
std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config);
/// @throws as make_builder().
std::unique_ptr<Impl> make_impl(const ImplConfig& config);

/// All checks of make_builder(). `op` is the name in errors.
void check_config(std::string_view op, const BuilderConfig& config);
void check_block_size(std::string_view op, int block_size);

}  // namespace attend::flashmla_sparse

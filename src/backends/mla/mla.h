// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>
#include <string_view>

#include "attend/backend/backend.h"

namespace attend::mla {

inline constexpr int kBlockSizeMultiple = 16;

/// The one instance; src/registry declares it too, from the list of components.
const Backend& backend() noexcept;

/// @throws InvalidArgument naming the field of `config` that is out of range; Unsupported if no
/// prefill back end serves it.
std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config);
/// @throws as make_builder().
std::unique_ptr<Impl> make_impl(const ImplConfig& config);

/// `op` is the name in the error.
void check_block_size(std::string_view op, int block_size);

}  // namespace attend::mla

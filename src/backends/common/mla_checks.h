// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "attend/backend/backend.h"

/// What all back ends of multi-head latent attention check. `op` is the name in the error; all
/// throw InvalidArgument.
namespace attend {

/// Sizes that the kernels have, and that heads and head size go with them.
void check_mla_dims(std::string_view op, const MlaDims& dims, int num_heads, int num_kv_heads,
                    int head_size);
/// That rows of the format hold such latents.
void check_mla_format(std::string_view op, const MlaDims& dims, KvFormat format);
/// Features of other attention that no MLA model has.
void check_mla_unused(std::string_view op, const ImplConfig& config);

/// A layer's call.
struct MlaCall {
  std::string_view op;
  MlaDims dims;
  int num_heads = 0;
  DType dtype = DType::bf16;
  int num_tokens = 0;  ///< of the batch; check_mla_results() does not look at it
};

void check_mla_rows(std::string_view op, std::string_view argument, const ConstTensorView& t,
                    int num_tokens);
/// The query and the new rows, and that nothing else is given.
void check_mla_inputs(const MlaCall& call, const ForwardArgs& args);
/// What is written whatever the metadata says.
void check_mla_results(const MlaCall& call, const ForwardArgs& args);
void check_mla_workspace(std::string_view op, Workspace workspace, std::size_t bytes);
/// @pre `cache` was checked.
void check_mla_cache_room(std::string_view op, const ConstTensorView& cache,
                          std::span<const std::int64_t> slots,
                          std::string_view cache_name = "kv_cache");

/// The block table of a batch, and the cache that it leads to.
struct MlaBlocks {
  ConstTensorView table;                   ///< i32 [requests, max_blocks], wide enough
  std::span<const std::int32_t> seq_lens;  ///< [requests]
  int tokens_of_entry = 0;
  std::int64_t num_blocks = 0;
};
/// That every block of a request's tokens is one of the cache.
void check_mla_blocks(std::string_view op, const MlaBlocks& blocks);

}  // namespace attend

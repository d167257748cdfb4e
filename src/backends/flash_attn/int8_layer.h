// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/backend/backend.h"
#include "attend/ops/int8_attention.h"
#include "attend/ops/int8_cache.h"
#include "backends/flash_attn/metadata.h"

namespace attend::flash_attn {

/// One call of a layer whose cache has int8 keys that are multiplied as integers (levels 1 and 2):
/// quantises the step's rows into the workspace, writes the new ones into the cache, attends.
class Int8Layer {
 public:
  /// @pre shapes and dtypes of the tensors in `args` have been checked.
  Int8Layer(const ImplConfig& config, const AttentionParams& params, const ForwardArgs& args,
            const FlashAttnMetadata& metadata);

  /// `writes`: the new keys and values go into the cache.
  /// @throws InvalidArgument, before anything but the workspace is written.
  void forward(bool writes, Executor& executor) const;

 private:
  FlashAttnVarlenInt8Args attention_args() const;
  ReshapeAndCacheInt8Args cache_args() const;
  TensorView key_cache() const;
  TensorView value_cache() const;
  ConstTensorView value_scales() const;
  void quantize_queries(Executor& executor) const;
  void quantize_new_rows(Executor& executor) const;

  const ImplConfig& config_;
  AttentionParams params_;
  const ForwardArgs& args_;
  const FlashAttnMetadata& m_;
  TensorView q_codes_, q_scale_, k_codes_, k_scale_, v_codes_;
};

}  // namespace attend::flash_attn

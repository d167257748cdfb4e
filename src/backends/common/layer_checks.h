// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string_view>
#include <vector>

#include "attend/backend/backend.h"
#include "attend/ops/attention.h"
#include "backends/common/attention_metadata.h"
#include "core/check.h"

/// What the impls of AttentionMetadata have in common: checks of a layer and of its calls.
namespace attend {

/// Scale, softcap, window, slopes and sinks of a layer. `op` is the name in the error.
void check_softmax(std::string_view op, const ImplConfig& config);
/// k_scale and v_scale; `allowed`: the cache is fp8.
void check_kv_scales(std::string_view op, const ImplConfig& config, bool allowed);
/// Makes one value a kv head of none or one.
void spread_kv_scales(ImplConfig& config);

/// That the metadata was made for layers with these heads and windows.
void check_layer(check::Where where, const AttentionMetadata& m, const ImplConfig& config,
                 int window_left, int window_right);
/// `t` is [>= num_tokens, heads, head_size] of the layer's dtype, last dimension contiguous.
void check_rows(check::Where where, const ConstTensorView& t, const ImplConfig& config, int heads,
                int num_tokens);
/// What is written whatever the metadata says: `num_heads` of output, and LSE of all query heads.
void check_results(std::string_view op, const ForwardArgs& args, const ImplConfig& config,
                   int num_heads);

/// Views of `config`, which must live as long as they do.
AttentionParams attention_params(const ImplConfig& config, const AttentionMetadata& m);
/// The same scale of a kv head for every request.
ConstTensorView per_request(const std::vector<float>& scales, int num_reqs);
ConstTensorView per_kv_head(const std::vector<float>& scales);

}  // namespace attend

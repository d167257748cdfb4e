// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace attend {

/// Most tokens whose keys and values MLA prefill makes of latents at a time, unless one request
/// brings more new ones. vLLM has 65536: its chunks cost a merge each, ours cost nothing, and keys
/// and values of 128 heads take 80 KiB a token.
inline constexpr std::int64_t kMlaMostWorkspaceTokens = 4096;

/// Longest query (inclusive) that takes the decode path of MLA, unless the caller says otherwise.
/// A token that decodes multiplies E + L numbers for each key and head instead of P + R + V, but
/// spares the projection of the context, L * (P + V) for each key and head: for the sizes of
/// DeepSeek-V3 the two meet at 170 tokens.
inline constexpr int kMlaDecodeThreshold = 128;

/// Tokens of the workspace of MLA prefill: vLLM's rule with another upper limit,
/// min(max(8 * max_model_len, 4 * max_num_seqs * block_size), kMlaMostWorkspaceTokens), at least a
/// piece of kPieceSize keys and a block, rounded up to whole pieces.
/// @pre All three are >= 1.
std::int64_t mla_workspace_tokens(std::int64_t max_model_len, int max_num_seqs,
                                  int block_size) noexcept;

}  // namespace attend

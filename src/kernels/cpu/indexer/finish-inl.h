// SPDX-License-Identifier: Apache-2.0
// What all levels do with a row, whichever instructions multiply. Included inside an ISA namespace.

/// Weights of the heads, filled up with zeros, at the end of the scratch memory.
ATTEND_INLINE float* stage_weights(const IndexerRow& row, std::int64_t head_bytes) {
  const auto padded = IndexerKernel::padded_heads(row.heads);
  auto* to = reinterpret_cast<float*>(static_cast<char*>(row.scratch) + padded * head_bytes);
  std::memcpy(to, row.weights, static_cast<std::size_t>(row.heads) * sizeof(float));
  for (std::int64_t h = row.heads; h < padded; ++h) to[h] = 0.0F;
  return to;
}

/// Stores the logits of keys [first, first + count) as far as they are wanted. Which sign and
/// payload a NaN has would depend on the order of operands, which is the compiler's.
ATTEND_INLINE void store_logits(const IndexerRow& row, int first, int count, const float* sums) {
  const int begin = first < row.begin ? row.begin : first;
  const int end = first + count < row.end ? first + count : row.end;
  for (int j = begin; j < end; ++j) {
    const float logit = sums[j - first] * row.scales[j];
    row.logits[j] = logit != logit ? std::numeric_limits<float>::quiet_NaN() : logit;
  }
}

// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

/// Queries, keys and values as models have them. Independent normal values cannot tell one scheme
/// of quantisation from another: what matters is how outliers lie.
namespace attend::conformance {

/// Where the outliers are.
enum class DataKind : std::uint8_t {
  iid,               ///< G0: nowhere, all values are N(0, 1)
  outliers,          ///< G1: anywhere, one value in 1000 has N(0, 100) added
  channels,          ///< G2: a few channels of the keys are large, with one sign, in all tokens
  rotated_channels,  ///< G3: as G2, then queries and keys rotated by position (RoPE)
  sink,              ///< G4: the first key is large in one channel and attracts most of the weight
};
inline constexpr DataKind kDataKinds[] = {DataKind::iid, DataKind::outliers, DataKind::channels,
                                          DataKind::rotated_channels, DataKind::sink};
std::string_view to_string(DataKind kind) noexcept;

struct DataShape {
  int queries = 128;    ///< >= 1; they stand behind the keys where positions matter
  int keys = 4096;      ///< >= 2; every query sees all of them
  int head_size = 128;  ///< a multiple of 8 from 8 to 256
};

/// One head. Every value is one that bf16 holds, so that 16-bit inputs are exact.
struct AttentionData {
  DataShape shape;
  std::vector<double> q;  ///< [queries, head_size]
  std::vector<double> k;  ///< [keys, head_size]
  std::vector<double> v;  ///< [keys, head_size]
};

/// Equal arguments give equal data. @throws InvalidArgument for a shape out of range.
AttentionData make_attention_data(DataKind kind, const DataShape& shape, std::uint64_t seed);

}  // namespace attend::conformance

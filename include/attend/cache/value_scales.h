// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "attend/core/tensor_view.h"

/// Scales of int8 values. Unlike a key's, a value's scale may not depend on the token, because the
/// products of weights and codes are summed over tokens. So it is found beforehand: run batches
/// that resemble the traffic, keep the largest magnitude of each (layer, KV head, element), store
/// the scales, load them in the server.
namespace attend {

/// Scales of all layers.
struct ValueScales {
  int num_layers = 0, num_kv_heads = 0, head_size = 0;  ///< each >= 1
  std::vector<float> scales;  ///< [num_layers, num_kv_heads, head_size], each finite and > 0

  /// f32 [num_kv_heads, head_size] of a layer, as scaled_int8_quant_for_attn takes it. Valid as
  /// long as `scales`. @throws InvalidArgument unless 0 <= layer < num_layers.
  ConstTensorView layer(int layer) const;

  /// Writes a safetensors file: per layer N an F32 tensor `layers.N.value_scale` [num_kv_heads,
  /// head_size]; metadata {"kind": "attend.value_scale", "version": "1"}. The file appears under
  /// its name when it is complete. @throws InvalidArgument (sizes below 1, a number of scales that
  /// does not fit them, a scale that is not finite and > 0), DeviceError (cannot be written).
  void save(const std::string& path) const;

  /// Reads such a file. Nothing in it is trusted. @throws InvalidArgument that names the file and
  /// what is wrong with it: not a regular file, a header that does not fit it, no JSON, repeated or
  /// unexpected names, another kind or version, a dtype other than F32, a shape other than two
  /// sizes
  /// >= 1 that all layers share, data outside of the file, overlapping or with gaps, missing
  /// layers, a scale that is not finite and > 0.
  static ValueScales load(const std::string& path);
};

/// Largest magnitudes of values over any number of batches. Not thread-safe.
class ValueScaleCalibration {
 public:
  /// @throws InvalidArgument unless every number is >= 1.
  ValueScaleCalibration(int num_layers, int num_kv_heads, int head_size);

  /// Takes the values of a batch: [T, num_kv_heads, head_size] f32, f16 or bf16, any strides,
  /// without rows of padding. No tokens is no error. @throws InvalidArgument (layer, shape, dtype,
  /// an infinity or NaN), and nothing of the batch counts then.
  void observe(int layer, const ConstTensorView& value);

  /// max(amax / 127, 1e-6) of everything observed so far.
  /// @throws InvalidArgument if a layer has seen no token.
  ValueScales scales() const;

 private:
  int num_layers_, num_kv_heads_, head_size_;
  std::vector<float> amax_;              // [num_layers, num_kv_heads, head_size]
  std::vector<std::int64_t> tokens_of_;  // [num_layers]
};

}  // namespace attend

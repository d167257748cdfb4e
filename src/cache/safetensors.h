// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

/// Files of float32 tensors in the safetensors format: the length of a JSON header as 8 bytes,
/// least significant first, the header, the data of the tensors one after the other.
namespace attend::safetensors {

struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;  ///< sizes >= 0
  std::vector<float> data;
};

struct File {
  std::map<std::string, std::string> metadata;
  std::vector<Tensor> tensors;  ///< in the order of their data
};

/// Reads a file that may be hostile: no size in it is believed before it is checked against the
/// size of the file. `op` names the caller in
/// errors. @throws InvalidArgument for argument 'path' (see ValueScales::load).
File read(std::string_view op, const std::string& path);

/// Writes a file; it appears under its name when it is complete. @pre names differ, data fits
/// shape.
/// @throws DeviceError if it cannot be written.
void write(const std::string& path, const File& file);

}  // namespace attend::safetensors

// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>

namespace attend {

/// Caller-owned scratch memory. Contents are undefined before and after each call.
struct Workspace {
  void* data = nullptr;  ///< 64-byte aligned; may be null if size is 0
  std::size_t size = 0;  ///< bytes
};

/// Owning, 64-byte aligned buffer (2 MiB aligned with huge pages requested from 2 MiB up).
class Buffer {
 public:
  Buffer() = default;
  /// Contents are zero. @throws DeviceError if memory cannot be had.
  explicit Buffer(std::size_t bytes);
  Buffer(Buffer&& o) noexcept;
  Buffer& operator=(Buffer&& o) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  void* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  Workspace workspace() const noexcept { return {data_, size_}; }
  /// Makes the buffer at least `bytes` large; contents are lost if it grows.
  void reserve(std::size_t bytes);

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace attend

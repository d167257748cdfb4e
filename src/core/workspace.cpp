// SPDX-License-Identifier: Apache-2.0
#include "attend/core/workspace.h"

#include <fmt/format.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "attend/core/error.h"
#include "attend/core/huge_pages.h"
#include "core/huge_mapping.h"

namespace attend {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t round_up(std::size_t n, std::size_t multiple) noexcept {
  return (n + multiple - 1) / multiple * multiple;
}

[[noreturn]] void fail(std::size_t bytes) {
  throw DeviceError(fmt::format("cannot allocate a buffer of {} bytes", bytes));
}

void* allocate(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  if (bytes > SIZE_MAX / 4) fail(bytes);
  if (bytes >= kHugePageBytes) {
    // Only a hint: without huge pages the buffer works, slower.
    void* data = map_huge_pages(bytes, true).data;
    if (data == nullptr) fail(bytes);
    return data;
  }
  void* p = std::aligned_alloc(kAlignment, round_up(bytes, kAlignment));
  if (p == nullptr) fail(bytes);
  return std::memset(p, 0, round_up(bytes, kAlignment));
}

void release(void* data, std::size_t bytes) noexcept {
  if (bytes >= kHugePageBytes) {
    unmap_huge_pages(data, bytes);
  } else {
    std::free(data);
  }
}

}  // namespace

Buffer::Buffer(std::size_t bytes) : data_(allocate(bytes)), size_(bytes) {}

Buffer::Buffer(Buffer&& o) noexcept
    : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}

Buffer& Buffer::operator=(Buffer&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(size_, o.size_);
  return *this;
}

Buffer::~Buffer() { release(data_, size_); }

void Buffer::reserve(std::size_t bytes) {
  if (bytes > size_) *this = Buffer(bytes);
}

}  // namespace attend

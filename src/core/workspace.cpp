// SPDX-License-Identifier: Apache-2.0
#include "attend/core/workspace.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "attend/core/error.h"

namespace attend {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kAlignment = 64;

std::size_t round_up(std::size_t n, std::size_t multiple) noexcept {
  return (n + multiple - 1) / multiple * multiple;
}

[[noreturn]] void fail(std::size_t bytes) {
  throw DeviceError(fmt::format("cannot allocate a buffer of {} bytes", bytes));
}

// mmap aligns to 4 KiB only: map one huge page more and give the ends back.
void* map_huge(std::size_t bytes) {
  const std::size_t size = round_up(bytes, kHugePage);
  void* base =
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) fail(bytes);
  auto* bytes_begin = static_cast<std::byte*>(base);
  const std::size_t head = round_up(reinterpret_cast<std::uintptr_t>(base), kHugePage) -
                           reinterpret_cast<std::uintptr_t>(base);
  if (head > 0) munmap(bytes_begin, head);
  munmap(bytes_begin + head + size, kHugePage - head);
  // Only a hint: without transparent huge pages the buffer works, slower.
  madvise(bytes_begin + head, size, MADV_HUGEPAGE);
  return bytes_begin + head;
}

void* allocate(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  if (bytes > SIZE_MAX / 4) fail(bytes);
  if (bytes >= kHugePage) return map_huge(bytes);
  void* p = std::aligned_alloc(kAlignment, round_up(bytes, kAlignment));
  if (p == nullptr) fail(bytes);
  return std::memset(p, 0, round_up(bytes, kAlignment));
}

void release(void* data, std::size_t bytes) noexcept {
  if (bytes >= kHugePage) {
    munmap(data, round_up(bytes, kHugePage));
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

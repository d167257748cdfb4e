// SPDX-License-Identifier: Apache-2.0
#include "core/small_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace attend {
namespace {

struct Descriptor {
  int fd;
  explicit Descriptor(int f) : fd(f) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
};

SmallFile failed(int error) {
  return {{}, std::generic_category().message(error), error == ENOENT || error == ENOTDIR};
}

}  // namespace

SmallFile read_small_file(const std::filesystem::path& path, std::size_t limit) {
  // A pipe without a writer would be waited for.
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (file.fd < 0) return failed(errno);
  struct stat status{};
  if (fstat(file.fd, &status) != 0) return failed(errno);
  if (!S_ISREG(status.st_mode)) return {{}, "not a regular file"};
  // The files of sysfs and procfs do not tell their size.
  SmallFile result;
  result.text.resize(limit + 1);
  std::size_t size = 0;
  while (size < result.text.size()) {
    const ssize_t got = read(file.fd, result.text.data() + size, result.text.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return failed(errno);
    if (got == 0) break;
    size += static_cast<std::size_t>(got);
  }
  if (size > limit) return {{}, fmt::format("more than {} bytes", limit)};
  result.text.resize(size);
  return result;
}

}  // namespace attend

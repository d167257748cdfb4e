// SPDX-License-Identifier: Apache-2.0
// What this machine's headers and compiler use and glibc 2.28 does not have, for the wheel only.
#define _GNU_SOURCE
#include <sys/random.h>
#include <sys/types.h>
#include <unistd.h>

struct stat;
extern int __xstat(int version, const char* path, struct stat* result);
extern int __lxstat(int version, const char* path, struct stat* result);
extern int __fxstat(int version, int file, struct stat* result);
extern int __fxstatat(int version, int folder, const char* path, struct stat* result, int flags);

enum { kStatVersion = 1 };  // of x86-64

int stat(const char* path, struct stat* result) { return __xstat(kStatVersion, path, result); }
int lstat(const char* path, struct stat* result) { return __lxstat(kStatVersion, path, result); }
int fstat(int file, struct stat* result) { return __fxstat(kStatVersion, file, result); }
int fstatat(int folder, const char* path, struct stat* result, int flags) {
  return __fxstatat(kStatVersion, folder, path, result, flags);
}

int fstat64(int file, struct stat* result) { return __fxstat(kStatVersion, file, result); }

// libstdc++ leaves out atomic operations where this is not 0.
char __libc_single_threaded = 0;

// For std::random_device, which has other sources and asks this one first.
unsigned int arc4random(void) {
  unsigned int value = 0;
  while (getrandom(&value, sizeof value, 0) != (ssize_t)sizeof value) {
  }
  return value;
}

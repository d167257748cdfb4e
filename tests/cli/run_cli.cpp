// SPDX-License-Identifier: Apache-2.0
#include "cli/run_cli.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace attend::testing {

CliResult run_cli(const std::string& arguments) {
  std::string err_path = std::filesystem::temp_directory_path() / "attend_cli_XXXXXX";
  const int fd = mkstemp(err_path.data());
  if (fd < 0) throw std::runtime_error("cannot make a temporary file");
  close(fd);
  const std::string command = std::string(ATTEND_CLI) + " " + arguments + " 2>" + err_path;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("cannot run " + command);
  CliResult result;
  std::array<char, 4096> buffer;
  for (std::size_t n; (n = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
    result.out.append(buffer.data(), n);
  }
  const int status = pclose(pipe);
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  std::ifstream err(err_path);
  result.err.assign(std::istreambuf_iterator<char>(err), {});
  std::remove(err_path.c_str());
  return result;
}

}  // namespace attend::testing

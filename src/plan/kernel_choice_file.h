// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "attend/plan/kernel_choice.h"

/// The file in which `attend tune` stores its choice. It is a hint of its user's cache folder and
/// never trusted: what it holds is used only if all of it is understood and made for this machine.
namespace attend::plan {

/// What a choice holds for.
struct ChoiceMachine {
  std::string version;           ///< of the library
  std::string cpu;               ///< cpu_identity()
  std::vector<IsaLevel> levels;  ///< available, ascending
};
/// This process.
ChoiceMachine this_machine();

/// attend/kernels.json in the cache folder of the XDG base directories, given the values of
/// XDG_CACHE_HOME and HOME (null = unset). Empty if they name none; relative ones count as unset.
std::filesystem::path choice_path(const char* xdg_cache_home, const char* home);
/// The same from this process's environment.
std::filesystem::path choice_path();

/// What a file says.
struct StoredChoice {
  std::optional<KernelLevels> levels;
  std::string problem;  ///< why there are none; empty if there are, or no file
};
StoredChoice read_choice(const std::filesystem::path& path, const ChoiceMachine& machine);

/// Makes the file's folder and sees whether it can be written to, so that nobody measures in vain.
/// @throws Error if it cannot.
void require_writable(const std::filesystem::path& path);

/// Replaces the file at once, so that readers see the old or the new one, and makes its folder.
/// @throws Error if that cannot be done.
void write_choice(const std::filesystem::path& path, const ChoiceMachine& machine,
                  const KernelLevels& levels);

/// The choice, given the value of ATTEND_ISA (null = unset).
/// @throws Unsupported as active_isa() does.
KernelChoice choose(const char* attend_isa, const std::filesystem::path& path,
                    const ChoiceMachine& machine);

}  // namespace attend::plan

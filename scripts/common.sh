# shellcheck shell=bash
# What the scripts share. Source it from a bash script; it changes into the root of the checkout.
set -euo pipefail
caller=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

# The same object files are found again from another checkout of the same sources.
export CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1
jobs=$(nproc)

build_packages=(g++ cmake ninja-build ccache pkg-config
  libfmt-dev libcli11-dev nlohmann-json3-dev libgtest-dev libgmock-dev)

say() { printf '\n== %s\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$1" >&2; exit "${2:-1}"; }

# Debian 12+, Ubuntu 24.04+. Releases without a number (testing, sid) count as new.
system_is_supported() {
  [ -r /etc/os-release ] || return 1
  local id version
  id=$(. /etc/os-release && echo "${ID:-}")
  version=$(. /etc/os-release && echo "${VERSION_ID:-999}")
  case $id in
    debian) dpkg --compare-versions "$version" ge 12 ;;
    ubuntu) dpkg --compare-versions "$version" ge 24.04 ;;
    *) return 1 ;;
  esac
}

package_is_installed() {
  case $1 in
    python3) command -v python3 >/dev/null ;;  # any Python 3 will do, not only the system's
    *) [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ] ;;
  esac
}

# need_packages REASON PACKAGE...: installs those that are missing and says so; does nothing else.
need_packages() {
  local reason=$1 package as_root=() missing=()
  shift
  system_is_supported || die "this script installs packages on Debian 12+ and Ubuntu 24.04+ only.
On another system install the equivalents of: $*
and build with: cmake --preset release && cmake --build --preset release" 2
  for package in "$@"; do
    package_is_installed "$package" || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "Installing with apt-get, $reason: ${missing[*]}"
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null ||
      die "not root and no sudo; as root run: apt-get install ${missing[*]}" 2
    as_root=(sudo)
  fi
  as_root+=(env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get -qq -o Dpkg::Use-Pty=0)
  "${as_root[@]}" update </dev/null
  "${as_root[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null
}

# need_python REASON: a python3 that makes environments and has its headers.
need_python() {
  need_packages "$1" python3
  python3 -c 'import ensurepip' 2>/dev/null || need_packages "$1" python3-venv
  python3 - <<'END' || need_packages "$1" python3-dev
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
END
}

need_build_packages() { need_packages "to build the library and its tests" "${build_packages[@]}"; }

# build_preset PRESET [TARGET...]: configures and builds into build/PRESET.
build_preset() {
  local preset=$1
  shift
  cmake --preset "$preset" --log-level=WARNING >/dev/null
  cmake --build "build/$preset" --parallel "$jobs" ${1:+--target "$@"}
}

# pip of .venv; without the lines about indexes that the machine is set up for and does not have.
venv_pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" 2> >(grep -v 'is ignored: it is neither' >&2); }

# install_package [SETTING...]: the package into .venv, with settings for scikit-build-core. The compiler's name is the
# one that presets use, so that ccache has every object file of build/release already.
install_package() {
  CXX=${CXX:-c++} CMAKE_BUILD_PARALLEL_LEVEL=$jobs venv_pip install --quiet --no-build-isolation --no-deps \
    --force-reinstall "${@/#/--config-settings=}" .
}

# Files of the project, tracked or new, that match the patterns; works whoever owns the checkout.
project_files() {
  git -c safe.directory='*' ls-files --cached --others --exclude-standard -- "$@" |
    while IFS= read -r file; do
      if [ -f "$file" ]; then printf '%s\n' "$file"; fi
    done
}

# shellcheck shell=sh
# What examples/run, tests/run and .ci/run have in common; they source this. Nothing is written outside build/.

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
script=$(basename -- "$(dirname -- "$0")")/${0##*/}

say() { printf '%s: %s\n' "$script" "$*"; }
die() {
  say "$*" >&2
  exit 1
}

# logged LOG MESSAGE COMMAND...: one line for the reader, with the seconds it took; the log is shown on failure.
logged() {
  log=$1
  printf '%s: %s ... ' "$script" "$2"
  shift 2
  began=$(date +%s)
  mkdir -p "$(dirname "$log")"
  if "$@" >"$log" 2>&1; then
    printf '%s s\n' "$(($(date +%s) - began))"
  else
    printf 'failed:\n'
    cat "$log" >&2
    return 1
  fi
}

# ---- what is missing ------------------------------------------------------------------------------------------------

# cells COLUMN NAME...: from dependencies.txt (2 version, 3 header, 4 Debian, 5 Fedora, 6 Homebrew), on one line
cells() (
  column=$1
  shift
  for name; do awk -v name="$name" -v column="$column" '$1 == name { print $column }' "$root/cmake/dependencies.txt"; done |
    paste -s -d ' ' -
)

# Without quotes below: CXX may hold a launcher too, as in "ccache g++".
# shellcheck disable=SC2086
compiles_cxx20() {
  printf '%s\n' '#include <concepts>' '#include <span>' \
    '#if defined __clang__ ? __clang_major__ < 14 : __GNUC__ < 12' '#error too old' '#endif' |
    $1 -std=c++20 -fsyntax-only -x c++ - >/dev/null 2>&1
}

# Exports CXX. One that the user has set is used or refused, never replaced.
find_compiler() {
  if [ -n "${CXX:-}" ]; then
    compiles_cxx20 "$CXX" || die "CXX is '$CXX', which is not g++ 12, clang++ 14 or newer"
    return 0
  fi
  for CXX in g++ clang++ g++-15 g++-14 g++-13 g++-12 clang++-18 clang++-17 clang++-16 clang++-15 clang++-14; do
    export CXX
    if compiles_cxx20 "$CXX"; then return 0; fi
  done
  unset CXX
  return 1
}

find_cmake() {
  command -v cmake >/dev/null || return 1
  cmake --version | awk -v least="$(cells 2 cmake)" '
    /^cmake version/ { split($3, has, "."); split(least, needs, ".") }
    END { exit !(has[1] > needs[1] || (has[1] == needs[1] && has[2] >= needs[2])) }'
}

find_build_tool() { command -v ninja >/dev/null || command -v make >/dev/null; }

# find_header PATH: in one of the places where packages are put
find_header() (
  IFS=':;'
  for prefix in /usr /usr/local /opt/homebrew ${CMAKE_PREFIX_PATH:-}; do
    if [ -e "$prefix/include/$1" ]; then exit 0; fi
  done
  exit 1
)

# ---- installing it --------------------------------------------------------------------------------------------------

apt_get() {
  set -- env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@"
  if [ "$(id -u)" -ne 0 ]; then set -- sudo "$@"; fi
  "$@"
}

# would_install PACKAGE...: what apt-get would fetch for them; fails where it does not know one of them
would_install() {
  plan=$(apt-get -s install --no-install-recommends "$@" 2>/dev/null) || return 1
  printf '%s\n' "$plan" | awk '/^Inst / { print $2 }' | paste -s -d ' ' -
}

install_packages() {
  if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then die "as root, please: apt-get install $*"; fi
  say "missing: $*"
  log=$root/build/apt.log
  updated=no
  if ! would_install "$@" >/dev/null; then
    logged "$log" "apt-get update" apt_get update
    updated=yes
  fi
  packages=$(would_install "$@") || die "apt-get cannot install them all: $*"
  say "apt-get installs these $(printf '%s\n' "$packages" | wc -w): $packages"
  if logged "$log" "apt-get install" apt_get install --no-install-recommends "$@"; then return 0; fi
  # Old lists name packages that the archive has replaced since.
  if [ "$updated" = yes ]; then exit 1; fi
  logged "$log" "apt-get update" apt_get update
  logged "$log" "apt-get install" apt_get install --no-install-recommends "$@"
}

# need LIBRARY...: a compiler, CMake, a build tool and these are here afterwards
need() {
  tools=
  find_compiler || tools="$tools compiler"
  find_cmake || tools="$tools cmake"
  find_build_tool || tools="$tools ninja"
  libraries=
  for library; do
    find_header "$(cells 3 "$library")" || libraries="$libraries $library"
  done
  if [ -z "$tools$libraries" ]; then return 0; fi
  # shellcheck disable=SC2046,SC2086
  if command -v apt-get >/dev/null; then
    install_packages $(cells 4 $tools $libraries)
    find_compiler || die "g++ is older than 12 here: install g++-12, clang-14 or newer"
    find_cmake || die "CMake is older than $(cells 2 cmake) here"
  elif [ -n "$tools" ]; then
    say "please install what is missing, and run $script again" >&2
    printf '  Fedora:   dnf install %s\n  Homebrew: brew install %s\n' \
      "$(cells 5 $tools $libraries)" "$(cells 6 $tools $libraries)" >&2
    exit 1
  fi
  # Elsewhere a library may be where only CMake looks; it names what it does not find.
}

# ---- building -------------------------------------------------------------------------------------------------------

cores() { nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2; }

# A folder configured for something else (a moved clone, another compiler or processor) is of no use.
# shellcheck disable=SC2086
configuration() {
  printf '%s\n' "$root" "$CXX" "${CXXFLAGS:-}"
  $CXX --version
  grep -m 1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || uname -m
}

# build PART TARGET [CMAKE_ARGUMENT...]: TESTS or EXAMPLES, optimised for this machine, in a folder that they share, so
# that what both need is compiled once; sets build_dir
build() {
  build_dir=$root/build/native
  part=$1
  target=$2
  shift 2
  set -- "$@" "-DSINKCACHE_BUILD_$part=ON"
  now=$(configuration)
  if [ "$now" != "$(cat "$build_dir/configuration" 2>/dev/null)" ]; then
    rm -rf "$build_dir"
    set -- -DSINKCACHE_BUILD_TESTS=OFF -DSINKCACHE_BUILD_EXAMPLES=OFF -DSINKCACHE_BUILD_BENCHMARKS=OFF "$@"
    set -- -DCMAKE_BUILD_TYPE=Release -DSINKCACHE_NATIVE=ON "$@"
    if command -v ninja >/dev/null; then set -- -G Ninja "$@"; fi
  fi
  rm -f "$build_dir/configuration" # what fails here must not be asked for again by the other part
  logged "$build_dir/configure.log" "configuring for $CXX" cmake -S "$root" -B "$build_dir" "$@"
  printf '%s\n' "$now" >"$build_dir/configuration"
  logged "$build_dir/$target.log" "building $target" cmake --build "$build_dir" --target "$target" -j "$(cores)"
}

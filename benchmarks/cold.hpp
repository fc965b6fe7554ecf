#pragma once

// How many bytes rows called cold walk through, so that every one of them comes from memory.

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <string>

namespace measure {

// A number at the start of a file, 0 where there is none. Linux says K for kilobytes.
inline std::size_t number_in(const std::string& file) {
  std::size_t number = 0;
  std::string unit;
  std::ifstream(file) >> number >> unit;
  return unit == "K" ? number << 10 : number;
}

// Bytes of the largest cache that the operating system reports, 0 if it reports none.
inline std::size_t last_level_cache() {
  std::size_t largest = 0;
  for (int i = 0; i < 8; ++i)
    largest = std::max(largest, number_in("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/size"));
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (largest == 0) largest = static_cast<std::size_t>(std::max(0L, ::sysconf(_SC_LEVEL3_CACHE_SIZE)));
#endif
  return largest;
}

// Bytes that a program may still take: of the machine, and of the container that it runs in.
inline std::size_t available_memory() {
  std::size_t bytes = SIZE_MAX;
  std::ifstream meminfo("/proc/meminfo");
  std::string name, rest;
  for (std::size_t kilobytes = 0; meminfo >> name >> kilobytes && std::getline(meminfo, rest);)
    if (name == "MemAvailable:") bytes = kilobytes << 10;
  for (const char* limit : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"})
    if (const std::size_t most = number_in(limit); most > 0) bytes = std::min(bytes, most);
  return bytes;
}

struct cold_memory {
  std::size_t bytes;
  std::string text;  // what they are, and whether they are enough
};

// Four times the last-level cache: what a walk comes back to was evicted long before.
inline cold_memory cold() {
  const std::size_t cache = last_level_cache(), most = available_memory() / 2;
  const std::size_t wanted = cache > 0 ? 4 * cache : std::size_t{192} << 20, bytes = std::min(wanted, most);
  std::string text = std::to_string(bytes >> 20) + " MiB, ";
  if (cache == 0)
    text += "NOT KNOWN TO BE COLD: the system does not say how large its last-level cache is";
  else if (bytes < wanted)
    text += "NOT COLD: half of the available memory, less than four times the last-level cache of " +
            std::to_string(cache >> 20) + " MiB";
  else
    text += "four times the last-level cache of " + std::to_string(cache >> 20) + " MiB";
  return {bytes, text};
}

}  // namespace measure

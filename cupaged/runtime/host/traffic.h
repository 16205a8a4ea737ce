// The traffic recorder: which 32-byte sectors each warp-wide load touches, as the load/store unit would count them.
//
// Lanes run one after another here, so a request has to be put together again: the n-th execution of a source line by
// each lane, counted since the lanes last met (at a barrier or a warp operation), is one instruction of the warp. A
// load of 0 bytes is one that its lane sat out: it counts as an execution and touches nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace cupaged {

constexpr uintptr_t kSectorBytes = 32;

struct LineCounters {
  uint64_t requests = 0, sectors = 0, bytes = 0;
};

// Counters by file, line and array.
using TrafficTable = std::map<std::tuple<std::string, int, int>, LineCounters>;

// What a thread block touches at least once: sectors, each with a bit for every byte that is asked for. A cache that
// loses nothing while the block runs would fetch just these.
using TouchedSectors = std::unordered_map<uintptr_t, uint32_t>;

struct ArrayCounters {
  uint64_t block_sectors = 0, block_bytes = 0;
};

using ArrayTable = std::map<int, ArrayCounters>;

inline int array_of(const Launch& launch, uintptr_t address) {
  for (int i = 0; i < launch.num_arrays; ++i)
    if (address >= launch.arrays[i][0] && address < launch.arrays[i][1]) return i;
  return -1;
}

class WarpTraffic {
 public:
  void add(int lane, const void* address, unsigned size, Site site) {
    loads_.push_back({site, reinterpret_cast<uintptr_t>(address), size, lane, 0});
  }

  // The lanes in `mask` have met: what they loaded until here forms whole requests.
  void close(uint32_t mask, const Launch& launch, TrafficTable& table, TouchedSectors& touched) {
    if (loads_.empty()) return;
    auto open = std::stable_partition(loads_.begin(), loads_.end(),
                                      [mask](const Load& load) { return (mask >> load.lane & 1u) != 0; });
    std::vector<Load> later(open, loads_.end());
    loads_.erase(open, loads_.end());
    number_executions();
    std::sort(loads_.begin(), loads_.end(), [](const Load& a, const Load& b) {
      if (a.site.line != b.site.line) return a.site.line < b.site.line;
      if (a.site.file != b.site.file) return a.site.file < b.site.file;
      if (a.execution != b.execution) return a.execution < b.execution;
      return a.address < b.address;
    });
    for (size_t first = 0; first < loads_.size();) {
      size_t last = first + 1;
      while (last < loads_.size() && same_request(loads_[first], loads_[last])) ++last;
      count_request(first, last, launch, table, touched);
      first = last;
    }
    loads_ = std::move(later);
  }

 private:
  struct Load {
    Site site;
    uintptr_t address;
    unsigned size;
    int lane;
    unsigned execution;
  };

  static bool same_request(const Load& a, const Load& b) {
    return a.site.line == b.site.line && a.site.file == b.site.file && a.execution == b.execution;
  }

  void number_executions() {
    std::map<std::pair<const char*, int>, std::vector<unsigned>> executed;
    for (Load& load : loads_) {
      auto& lanes = executed[{load.site.file, load.site.line}];
      lanes.resize(32);
      load.execution = lanes[load.lane]++;
    }
  }

  void count_request(size_t first, size_t last, const Launch& launch, TrafficTable& table, TouchedSectors& touched) {
    while (first < last && loads_[first].size == 0) ++first;
    if (first == last) return;
    const Load& load = loads_[first];
    LineCounters& line = table[{load.site.file, load.site.line, array_of(launch, load.address)}];
    uintptr_t next_sector = 0, next_byte = 0;   // the first ones that no earlier lane has touched
    for (size_t i = first; i < last; ++i) {
      if (loads_[i].size == 0) continue;
      const uintptr_t begin = loads_[i].address, end = begin + loads_[i].size;
      const uintptr_t sector_begin = std::max(begin / kSectorBytes, next_sector);
      const uintptr_t sector_end = (end - 1) / kSectorBytes + 1;
      if (sector_end > sector_begin) line.sectors += sector_end - sector_begin, next_sector = sector_end;
      const uintptr_t byte_begin = std::max(begin, next_byte);
      if (end > byte_begin) line.bytes += end - byte_begin, next_byte = end;
      for (uintptr_t byte = begin; byte < end;) {
        const uintptr_t sector = byte / kSectorBytes, first_bit = byte % kSectorBytes;
        const uintptr_t stop = std::min(end, (sector + 1) * kSectorBytes);
        touched[sector] |= static_cast<uint32_t>(((uint64_t{1} << (stop - byte)) - 1) << first_bit);
        byte = stop;
      }
    }
    line.requests += 1;
  }

  std::vector<Load> loads_;
};

// A block has ended: add what it touched to the launch's counters.
inline void add_block(TouchedSectors& touched, const Launch& launch, ArrayTable& table) {
  for (const auto& [sector, bytes] : touched) {
    const uintptr_t first_byte = sector * kSectorBytes + static_cast<uintptr_t>(__builtin_ctz(bytes));
    ArrayCounters& array = table[array_of(launch, first_byte)];
    array.block_sectors += 1;
    array.block_bytes += static_cast<uint64_t>(__builtin_popcount(bytes));
  }
  touched.clear();
}

}  // namespace cupaged

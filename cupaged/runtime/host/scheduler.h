// The contract between a kernel built for the host and the scheduler that runs it.
//
// A kernel's shared object calls these functions; scheduler.cpp defines them. Each CUDA thread is a fiber: it runs
// until it meets a barrier or a warp operation whose other lanes have not arrived, then control goes to another one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cupaged {

struct Index3 {
  unsigned int x, y, z;
};

// Where in the source a thread stands, for error messages and for the traffic recorder.
struct Site {
  const char* file;
  int line;
};

// What one CUDA thread knows about itself; the scheduler points `this_thread` at it before the thread runs on.
struct ThreadContext {
  Index3 thread_index, block_index, block_dim, grid_dim;
  bool record_traffic;
};

extern __thread ThreadContext* this_thread;

enum class WarpOperation : int { exchange, ballot, synchronise };

// Block-wide barrier; returns how many threads passed a true predicate.
int barrier(bool predicate, Site site);

// Warp-wide meeting of the lanes in `mask`: exchange returns the value of `source_lane`, ballot the lanes that passed
// a value other than 0, synchronise 0.
uint64_t meet_warp(WarpOperation operation, uint32_t mask, uint64_t value, int source_lane, Site site);

// Note a load of `size` bytes of global memory by the running thread; 0 if it sits this one out.
void record_load(const void* address, unsigned size, Site site);

// Copies that run on their own: note one of 16 bytes (zeros if `from` is null), close the group of those noted since the
// last one, and make those of all groups but the latest few that are not made yet. A thread's own; they end with it.
void note_copy(void* to, const void* from);
void close_copies();
void make_copies(int groups_left);

// 32 lanes of 3 words that the lanes of the running thread's warp can all read and write. Not shared memory of the
// kernel: what the twins of warp-wide instructions exchange operands through.
struct WarpBoard {
  uint64_t word[32][3];
};
WarpBoard& warp_board();

// Abandon the launch with a message; does not return.
[[noreturn]] void fail(Site site, const char* message);

// One launch, as Python describes it. Plain C types: ctypes fills it in.
struct Launch {
  void (*entry)(void** arguments);    // calls the kernel with its arguments
  void (*touch_shared)();             // makes the calling OS thread allocate the kernel's __shared__ variables
  void** arguments;                   // one pointer per kernel parameter, to its value
  uint32_t grid[3], block[3];
  uint64_t dynamic_shared_bytes;
  uint64_t seed;                      // 0: threads run in index order; else a shuffled order. Modulo 3: copies that run
                                      // on their own arrive when they are waited for, at once, or each by chance
  int32_t workers;                    // OS threads to spread the blocks over
  int32_t record_traffic;
  int32_t num_arrays;                 // the arrays among the arguments, so that traffic can be told apart
  const uint64_t (*arrays)[2];        // [num_arrays]: first address, first address past the end
};

// Traffic of one source line to one array, summed over a launch.
struct LineTraffic {
  char file[256];
  int32_t line;
  int32_t array;       // index into Launch::arrays; -1 for memory that is in none
  uint64_t requests;   // warp-wide load instructions
  uint64_t sectors;    // 32-byte sectors that they touch, counted per request
  uint64_t bytes;      // distinct bytes that they ask for, counted per request
};

// Traffic to one array, by thread block: what each block touches at least once, summed over a launch's blocks.
struct ArrayTraffic {
  int32_t array;            // as in LineTraffic
  uint64_t block_sectors;   // distinct sectors
  uint64_t block_bytes;     // distinct bytes
};

}  // namespace cupaged

extern "C" {
// Run a launch to its end. Returns 0, or 1 with a message in `error`.
int cupaged_launch(const cupaged::Launch* launch, char* error, size_t error_size);
// Copy up to `capacity` lines of the calling thread's last recorded launch; returns how many there are.
int cupaged_traffic(cupaged::LineTraffic* lines, int capacity);
int cupaged_block_traffic(cupaged::ArrayTraffic* arrays, int capacity);
}

// Runs a CUDA grid on the CPU: one fiber a thread, real barriers, warps that meet, blocks spread over OS threads.
//
// A warp is run as far as it can go before the next one starts, the opposite of a GPU's fair rotation: a missing
// barrier then shows, because one warp is a whole phase ahead of the others. A seed shuffles the order of warps,
// lanes and blocks, and says when copies that run on their own arrive. Shared memory starts out as NaN, so does what such
// a copy has not filled yet, and the bytes behind it are checked.
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "fiber.h"
#include "traffic.h"

#if defined(__linux__)
#include <link.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CUPAGED_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUPAGED_ASAN 1
#endif
#endif
#ifdef CUPAGED_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

constexpr size_t kDynamicSharedCapacity = 256 * 1024;   // more than any GPU gives a block
// What `extern __shared__ unsigned char dynamic_shared[]` in a kernel refers to.
alignas(1024) thread_local unsigned char dynamic_shared[kDynamicSharedCapacity];

namespace cupaged {

__thread ThreadContext* this_thread = nullptr;

namespace {

constexpr int kWarpSize = 32;
constexpr unsigned char kPoison = 0xff;                 // as a half, bfloat16 or float: NaN
constexpr size_t kCanaryBytes = 64;
constexpr size_t kStackBytes = 1024 * 1024;             // address space; pages that a thread does not touch take no memory
constexpr size_t kGuardBytes = 64 * 1024;
constexpr uint64_t kMaxStacks = 20000;                  // a process may have some 65,000 mappings, and a stack is two

enum class State : uint8_t { ready, at_barrier, in_warp_operation, finished };

constexpr size_t kCopyBytes = 16;

struct PendingCopy {
  void* to;
  const void* from;                                     // null: zeros
  int group;

  void make() const {
    if (from != nullptr) std::memcpy(to, from, kCopyBytes);
    else std::memset(to, 0, kCopyBytes);
  }
};

// When a copy that runs on its own arrives: the GPU makes it at any time between its start and the wait for it.
enum class Arrival : uint64_t { at_the_wait, at_once, by_chance };
Arrival arrival_of(uint64_t seed) { return static_cast<Arrival>(seed % 3); }

struct Fiber {
  ThreadContext context;
  void* stack_pointer;
  State state;
  Site site;                  // where it waits
  // What it brought to a warp operation, and took away.
  WarpOperation operation;
  uint32_t mask;
  uint64_t value;
  int source_lane;
  std::vector<PendingCopy> copies;   // noted, not yet made
  int open_group;
#ifdef CUPAGED_ASAN
  void* fake_stack;
#endif
};

struct Warp {
  uint32_t lanes;             // the lanes that exist
  uint32_t ready;
  uint32_t waiting;           // lanes in a warp operation
  WarpTraffic traffic;
  WarpBoard board;
};

// Fiber stacks, each behind guard pages and touched only as far as a kernel needs; reused by later launches.
class StackPool {
 public:
  ~StackPool() {
    for (auto& base : stacks_) munmap(base, kStackBytes);
  }
  // The top of stack i, shifted a little from its neighbours' so that they do not share cache sets.
  void* top(size_t i) {
    while (stacks_.size() <= i) {
      void* base = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (base == MAP_FAILED) return nullptr;
      if (mprotect(base, kGuardBytes, PROT_NONE) != 0) {
        munmap(base, kStackBytes);
        return nullptr;
      }
      stacks_.push_back(static_cast<unsigned char*>(base));
    }
    return stacks_[i] + kStackBytes - (i % 61) * 192;
  }
  unsigned char* base(size_t i) { return stacks_[i]; }

 private:
  std::vector<unsigned char*> stacks_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull) {}
  uint32_t below(uint32_t n) {                          // xorshift64*
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return static_cast<uint32_t>(((state_ * 0x2545f4914f6cdd1dull >> 32) * n) >> 32);
  }

 private:
  uint64_t state_;
};

// What the blocks of one launch share.
struct Progress {
  explicit Progress(const Launch& launch)
      : launch(launch), num_blocks(uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2]) {}
  const Launch& launch;
  const uint64_t num_blocks;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
  TrafficTable traffic;
  ArrayTable arrays;
};

std::string describe(const Index3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string describe(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// The __shared__ variables of the kernel: the thread-local storage of its shared object, in this OS thread.
struct SharedVariables {
  unsigned char* begin = nullptr;
  size_t size = 0;

  explicit SharedVariables(const Launch& launch) {
    launch.touch_shared();
#if defined(__linux__)
    struct Search {
      uintptr_t code;
      SharedVariables* found;
    } search{reinterpret_cast<uintptr_t>(launch.entry), this};
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* data) {
          auto& search = *static_cast<Search*>(data);
          bool holds_kernel = false;
          size_t tls_bytes = 0;
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            const auto& header = module->dlpi_phdr[i];
            const uintptr_t start = module->dlpi_addr + header.p_vaddr;
            if (header.p_type == PT_LOAD && search.code >= start && search.code < start + header.p_memsz) holds_kernel = true;
            if (header.p_type == PT_TLS) tls_bytes = header.p_memsz;
          }
          if (!holds_kernel) return 0;
          if (module->dlpi_tls_data != nullptr) {
            search.found->begin = static_cast<unsigned char*>(module->dlpi_tls_data);
            search.found->size = tls_bytes;
          }
          return 1;
        },
        &search);
#endif
  }
};

// One OS thread's share of a launch: it runs whole blocks, one at a time.
class Worker {
 public:
  void run(Progress& progress) {
    progress_ = &progress;
    launch_ = &progress.launch;
    active_ = this;
    const Launch& launch = *launch_;
    num_threads_ = static_cast<int>(launch.block[0] * launch.block[1] * launch.block[2]);
    fibers_.resize(num_threads_);
    warps_.resize((num_threads_ + kWarpSize - 1) / kWarpSize);
    warp_order_.resize(warps_.size());
    if (stacks_.top(num_threads_ - 1) == nullptr) {
      report("no memory for " + std::to_string(num_threads_) + " fiber stacks");
      return;
    }
    const SharedVariables shared(launch);
    while (!progress.failed) {
      const uint64_t turn = progress.next++;
      if (turn >= progress.num_blocks) break;
      poison(shared);
      run_block(block_of_turn(turn));
    }
    merge_traffic();
    active_ = nullptr;
  }

  static Worker& active() { return *active_; }

  int barrier(bool predicate, Site site) {
    Fiber& fiber = running();
    fiber.site = site;
    fiber.state = State::at_barrier;
    at_barrier_ += 1;
    predicates_ += predicate ? 1 : 0;
    leave();
    return barrier_result_;
  }

  uint64_t meet_warp(WarpOperation operation, uint32_t mask, uint64_t value, int source_lane, Site site) {
    Fiber& fiber = running();
    const int lane = current_ % kWarpSize;
    Warp& warp = warps_[current_ / kWarpSize];
    mask &= warp.lanes;                                  // a last warp that is not full has no other lanes
    if (source_lane < 0 || source_lane >= kWarpSize) fail(site, "a shuffle reads lane " + std::to_string(source_lane));
    if ((mask >> lane & 1u) == 0) fail(site, "a thread takes part in a warp operation whose mask leaves it out");
    fiber.site = site;
    fiber.operation = operation;
    fiber.mask = mask;
    fiber.value = value;
    fiber.source_lane = source_lane;
    warp.waiting |= 1u << lane;
    if ((warp.waiting & mask) == mask) {
      complete(warp, current_ - lane, mask, site);
      warp.ready &= ~(1u << lane);                       // this lane runs on without a switch
      fiber.state = State::ready;
    } else {
      fiber.state = State::in_warp_operation;
      leave();
    }
    return fiber.value;
  }

  void record_load(const void* address, unsigned size, Site site) {
    warps_[current_ / kWarpSize].traffic.add(current_ % kWarpSize, address, size, site);
  }

  // Whoever reads before the wait may find what was there before, what is copied, or neither: NaN, for those to come.
  void note_copy(void* to, const void* from) {
    const PendingCopy copy{to, from, running().open_group};
    const Arrival arrival = arrival_of(launch_->seed);
    if (arrival == Arrival::at_once || (arrival == Arrival::by_chance && arrivals_.below(2) != 0)) return copy.make();
    std::memset(to, kPoison, kCopyBytes);
    running().copies.push_back(copy);
  }

  void close_copies() { running().open_group += 1; }

  void make_copies(int groups_left) {
    Fiber& fiber = running();
    size_t made = 0;
    for (; made < fiber.copies.size() && fiber.copies[made].group < fiber.open_group - groups_left; ++made)
      fiber.copies[made].make();
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(made));
  }

  WarpBoard& board() { return warps_[current_ / kWarpSize].board; }

  [[noreturn]] void fail(Site site, const std::string& message) {
    report("thread " + describe(running().context.thread_index) + " of block " +
           describe(running().context.block_index) + " at " + describe(site) + ": " + message);
    leave();
    __builtin_unreachable();                             // an abandoned fiber is never resumed
  }

 private:
  Fiber& running() { return fibers_[current_]; }

  void report(const std::string& message) {
    std::lock_guard<std::mutex> hold(progress_->mutex);
    if (progress_->error.empty()) progress_->error = message;
    progress_->failed = true;
    failed_ = true;
  }

  Index3 block_of_turn(uint64_t turn) {
    const Launch& launch = *launch_;
    if (launch.seed != 0 && progress_->num_blocks > 2) {   // a stride that shares no factor visits every block once
      uint64_t stride = progress_->num_blocks / 2 + launch.seed % (progress_->num_blocks / 2);
      while (std::gcd(stride, progress_->num_blocks) != 1) ++stride;
      turn = (turn * stride + launch.seed) % progress_->num_blocks;
    }
    const uint64_t x = launch.grid[0], y = launch.grid[1];
    return {static_cast<unsigned>(turn % x), static_cast<unsigned>(turn / x % y), static_cast<unsigned>(turn / x / y)};
  }

  void poison(const SharedVariables& shared) {
    if (shared.begin != nullptr) std::memset(shared.begin, kPoison, shared.size);
#ifdef CUPAGED_ASAN
    __asan_unpoison_memory_region(dynamic_shared, kDynamicSharedCapacity);
#endif
    std::memset(dynamic_shared, kPoison, launch_->dynamic_shared_bytes + kCanaryBytes);
#ifdef CUPAGED_ASAN
    const size_t end = (launch_->dynamic_shared_bytes + 7) / 8 * 8;
    __asan_poison_memory_region(dynamic_shared + end, kDynamicSharedCapacity - end);
#endif
  }

  void check_canary(const Index3& block) {
#ifndef CUPAGED_ASAN
    const unsigned char* end = dynamic_shared + launch_->dynamic_shared_bytes;
    for (size_t i = 0; i < kCanaryBytes; ++i)
      if (end[i] != kPoison)
        return report("block " + describe(block) + " wrote past its " + std::to_string(launch_->dynamic_shared_bytes) +
                      " bytes of dynamic shared memory");
#else
    (void)block;
#endif
  }

  void run_block(const Index3& block) {
    const Launch& launch = *launch_;
    Random random(launch.seed + 0x10001ull * (block.x + 977ull * block.y + 991ull * 977ull * block.z));
    arrivals_ = random;
    start_fibers(block);
    finished_ = at_barrier_ = predicates_ = 0;
    failed_ = false;
    std::iota(warp_order_.begin(), warp_order_.end(), 0);
    while (true) {
      if (launch.seed != 0) {
        for (size_t i = warp_order_.size(); i > 1; --i)
          std::swap(warp_order_[i - 1], warp_order_[random.below(static_cast<uint32_t>(i))]);
      }
      for (const int index : warp_order_) {
        Warp& warp = warps_[index];
        while (warp.ready != 0) {
          const int lane = launch.seed != 0 ? shuffled_lane(warp.ready, random) : __builtin_ctz(warp.ready);
          warp.ready &= ~(1u << lane);
          resume(index * kWarpSize + lane);
          if (failed_) return;
        }
      }
      if (finished_ == num_threads_) break;
      if (!release_barrier()) return report_stuck(block);
    }
    if (launch.record_traffic) {
      for (Warp& warp : warps_) warp.traffic.close(~0u, *launch_, traffic_, touched_);
      add_block(touched_, launch, arrays_);
    }
    check_canary(block);
  }

  void start_fibers(const Index3& block) {
    const Launch& launch = *launch_;
    for (int i = 0; i < num_threads_; ++i) {
      const unsigned x = launch.block[0], y = launch.block[1], t = static_cast<unsigned>(i);
      Fiber& fiber = fibers_[i];
      fiber.context = {{t % x, t / x % y, t / x / y},
                       block,
                       {launch.block[0], launch.block[1], launch.block[2]},
                       {launch.grid[0], launch.grid[1], launch.grid[2]},
                       launch.record_traffic != 0};
      fiber.copies.clear();
      fiber.open_group = 0;
      fiber.state = State::ready;
      fiber.stack_pointer = fresh_stack(stacks_.top(i), &Worker::fiber_main);
#ifdef CUPAGED_ASAN
      fiber.fake_stack = nullptr;
      __asan_unpoison_memory_region(stacks_.base(i) + kGuardBytes, kStackBytes - kGuardBytes);
#endif
    }
    for (size_t w = 0; w < warps_.size(); ++w) {
      const int lanes = std::min(kWarpSize, num_threads_ - static_cast<int>(w) * kWarpSize);
      warps_[w].lanes = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
      warps_[w].ready = warps_[w].lanes;
      warps_[w].waiting = 0;
      warps_[w].traffic = WarpTraffic();
    }
  }

  static int shuffled_lane(uint32_t ready, Random& random) {
    const uint32_t start = random.below(kWarpSize);
    const uint32_t rotated = start == 0 ? ready : (ready >> start | ready << (kWarpSize - start));
    return static_cast<int>((__builtin_ctz(rotated) + start) % kWarpSize);
  }

  // Every thread that is left waits. If all of them stand at one barrier, they may pass.
  bool release_barrier() {
    if (at_barrier_ != num_threads_) return false;
    const Site site = fibers_[0].site;
    for (const Fiber& fiber : fibers_)
      if (!same(fiber.site, site)) return false;
    barrier_result_ = predicates_;
    at_barrier_ = predicates_ = 0;
    for (Warp& warp : warps_) {
      warp.ready = warp.lanes;
      if (launch_->record_traffic) warp.traffic.close(~0u, *launch_, traffic_, touched_);
    }
    return true;
  }

  void report_stuck(const Index3& block) {
    const Fiber* waiting = nullptr;
    const Fiber* other = nullptr;
    for (const Fiber& fiber : fibers_)
      if (fiber.state != State::finished && waiting == nullptr) waiting = &fiber;
    for (const Fiber& fiber : fibers_)
      if (fiber.state != waiting->state || !same(fiber.site, waiting->site)) {
        other = &fiber;
        break;
      }
    std::string message = "divergence in block " + describe(block) + ": thread " +
                          describe(waiting->context.thread_index) + " waits " + where(*waiting);
    if (other != nullptr)
      message += ", but thread " + describe(other->context.thread_index) +
                 (other->state == State::finished ? " has exited" : " waits " + where(*other));
    else
      message += ", and no other thread can join it";
    report(message);
  }

  static std::string where(const Fiber& fiber) {
    const char* at = fiber.state == State::at_barrier ? "at the barrier in " : "in the warp operation in ";
    return at + describe(fiber.site);
  }

  // All lanes of `mask` have arrived: hand each its result and make it ready.
  void complete(Warp& warp, int first_thread, uint32_t mask, Site site) {
    const WarpOperation operation = running().operation;
    uint64_t values[kWarpSize];
    uint32_t votes = 0;
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const Fiber& fiber = fibers_[first_thread + lane];
      if (fiber.mask != mask || fiber.operation != operation || !same(fiber.site, site))
        fail(site, "its warp diverged: lane " + std::to_string(lane) + " is " +
                       (fiber.mask != mask ? "here with another mask" : "in another operation, in " + describe(fiber.site)));
      values[lane] = fiber.value;
      votes |= (fiber.value != 0 ? 1u : 0u) << lane;
    }
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      Fiber& fiber = fibers_[first_thread + __builtin_ctz(left)];
      fiber.state = State::ready;
      if (operation == WarpOperation::ballot) {
        fiber.value = votes;
      } else if (operation == WarpOperation::exchange) {
        if ((mask >> fiber.source_lane & 1u) == 0)
          fail(site, "a shuffle reads lane " + std::to_string(fiber.source_lane) + ", which takes no part in it");
        fiber.value = values[fiber.source_lane];
      } else {
        fiber.value = 0;
      }
    }
    warp.waiting &= ~mask;
    warp.ready |= mask;
    if (launch_->record_traffic) warp.traffic.close(mask, *launch_, traffic_, touched_);
  }

  void resume(int index) {
    current_ = index;
    Fiber& fiber = fibers_[index];
    this_thread = &fiber.context;
#ifdef CUPAGED_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, stacks_.base(index), kStackBytes);
#endif
    cupaged_switch_stack(&stack_pointer_, fiber.stack_pointer);
#ifdef CUPAGED_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // Back from the running fiber to the scheduler.
  void leave() {
    Fiber& fiber = running();
#ifdef CUPAGED_ASAN
    const bool for_good = fiber.state == State::finished || failed_;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, home_base_, home_size_);
#endif
    cupaged_switch_stack(&fiber.stack_pointer, stack_pointer_);
#ifdef CUPAGED_ASAN
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &home_base_, &home_size_);
#endif
  }

  static void fiber_main() {
    Worker& worker = active();
#ifdef CUPAGED_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &worker.home_base_, &worker.home_size_);
#endif
    worker.launch_->entry(worker.launch_->arguments);
    worker.running().state = State::finished;
    worker.finished_ += 1;
    worker.leave();
    __builtin_unreachable();
  }

  void merge_traffic() {
    std::lock_guard<std::mutex> hold(progress_->mutex);
    for (const auto& [line, counters] : traffic_) {
      LineCounters& sum = progress_->traffic[line];
      sum.requests += counters.requests, sum.sectors += counters.sectors, sum.bytes += counters.bytes;
    }
    for (const auto& [array, counters] : arrays_) {
      ArrayCounters& sum = progress_->arrays[array];
      sum.block_sectors += counters.block_sectors, sum.block_bytes += counters.block_bytes;
    }
    traffic_.clear();
    arrays_.clear();
    touched_.clear();
  }

  static thread_local Worker* active_;
  Progress* progress_ = nullptr;
  const Launch* launch_ = nullptr;
  StackPool stacks_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> warp_order_;
  Random arrivals_{0};                 // of copies, by chance
  TrafficTable traffic_;
  TouchedSectors touched_;             // by the block that runs
  ArrayTable arrays_;
  void* stack_pointer_ = nullptr;      // the scheduler's own, while a fiber runs
  int num_threads_ = 0, current_ = 0, finished_ = 0, at_barrier_ = 0, predicates_ = 0, barrier_result_ = 0;
  bool failed_ = false;
#ifdef CUPAGED_ASAN
  void* fake_stack_ = nullptr;
  const void* home_base_ = nullptr;
  size_t home_size_ = 0;
#endif
};

thread_local Worker* Worker::active_ = nullptr;

// Workers keep their stacks between launches; concurrent launches take different ones.
class WorkerPool {
 public:
  std::unique_ptr<Worker> take() {
    std::lock_guard<std::mutex> hold(mutex_);
    if (idle_.empty()) return std::make_unique<Worker>();
    auto worker = std::move(idle_.back());
    idle_.pop_back();
    return worker;
  }
  void give_back(std::unique_ptr<Worker> worker) {
    std::lock_guard<std::mutex> hold(mutex_);
    idle_.push_back(std::move(worker));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> idle_;
};

WorkerPool& worker_pool() {
  static auto* pool = new WorkerPool;   // never destroyed: launches may outlive static destructors
  return *pool;
}

thread_local TrafficTable last_traffic;
thread_local ArrayTable last_arrays;

}  // namespace

int barrier(bool predicate, Site site) { return Worker::active().barrier(predicate, site); }

uint64_t meet_warp(WarpOperation operation, uint32_t mask, uint64_t value, int source_lane, Site site) {
  return Worker::active().meet_warp(operation, mask, value, source_lane, site);
}

void record_load(const void* address, unsigned size, Site site) { Worker::active().record_load(address, size, site); }

void note_copy(void* to, const void* from) { Worker::active().note_copy(to, from); }

void close_copies() { Worker::active().close_copies(); }

void make_copies(int groups_left) { Worker::active().make_copies(groups_left); }

WarpBoard& warp_board() { return Worker::active().board(); }

void fail(Site site, const char* message) { Worker::active().fail(site, message); }

}  // namespace cupaged

extern "C" int cupaged_launch(const cupaged::Launch* launch, char* error, size_t error_size) {
  using namespace cupaged;
  Progress progress(*launch);
  const auto share = [&progress] {
    auto worker = worker_pool().take();
    worker->run(progress);
    worker_pool().give_back(std::move(worker));
  };
  std::vector<std::thread> helpers;
  const uint64_t threads = uint64_t{launch->block[0]} * launch->block[1] * launch->block[2];
  const uint64_t wanted = std::min({uint64_t(launch->workers), progress.num_blocks, std::max(kMaxStacks / threads, uint64_t{1})});
  try {
    for (uint64_t i = 1; i < wanted; ++i) helpers.emplace_back(share);
  } catch (const std::system_error&) {
    // no more threads are to be had: those that are do the work
  }
  share();
  for (auto& helper : helpers) helper.join();
  last_traffic = std::move(progress.traffic);
  last_arrays = std::move(progress.arrays);
  if (!progress.failed) return 0;
  std::snprintf(error, error_size, "%s", progress.error.c_str());
  return 1;
}

extern "C" int cupaged_traffic(cupaged::LineTraffic* lines, int capacity) {
  int count = 0;
  for (const auto& [where, counters] : cupaged::last_traffic) {
    if (count < capacity) {
      auto& line = lines[count];
      const std::string& file = std::get<0>(where);   // of a path that is too long, its end
      std::snprintf(line.file, sizeof line.file, "%s", file.c_str() + (file.size() < sizeof line.file ? 0 : file.size() - sizeof line.file + 1));
      line.line = std::get<1>(where), line.array = std::get<2>(where);
      line.requests = counters.requests, line.sectors = counters.sectors, line.bytes = counters.bytes;
    }
    count += 1;
  }
  return count;
}

extern "C" int cupaged_block_traffic(cupaged::ArrayTraffic* arrays, int capacity) {
  int count = 0;
  for (const auto& [array, counters] : cupaged::last_arrays) {
    if (count < capacity) arrays[count] = {array, counters.block_sectors, counters.block_bytes};
    count += 1;
  }
  return count;
}

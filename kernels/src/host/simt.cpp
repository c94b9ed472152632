// The scheduler of simt.h. Compiled without a sanitizer, so that a report speaks of a kernel.
//
// One lane (CUDA thread) runs at a time; it goes on until it meets others, and then hands over to the next one
// that is ready. When none is, either a meeting is complete and its lanes go on, or the block is stuck and the
// run ends with a sentence that says who waits for whom.
#include <semaphore.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "simt_runner.h"

// There only where ThreadSanitizer is linked.
extern "C" {
__attribute__((weak)) void AnnotateIgnoreSyncBegin(const char*, int);
__attribute__((weak)) void AnnotateIgnoreSyncEnd(const char*, int);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
// The linker puts the kernels' __shared__ arrays between these two: see simt.ld.
extern unsigned char simt_shared_begin[], simt_shared_end[];
}

namespace simt {

const bool one_thread_at_a_time = true;
thread_local dim3 thread_index, block_index, block_size, grid_size;
thread_local std::vector<Copy> copies_under_way;
thread_local unsigned copy_groups;

namespace {

enum State { READY, AT_BARRIER, IN_WARP, RETURNED };

struct Lane {
  State state = READY;
  int line = 0;                     // where it waits
  const char* intrinsic = nullptr;  // what for, in a warp
  unsigned mask = 0;
  Words words = {};
  Exchange said;
  sem_t turn;  // twice as fast as a mutex with a condition variable

  Lane() { sem_init(&turn, 0, 0); }
  ~Lane() { sem_destroy(&turn); }
};

// What ThreadSanitizer sees: all that came before release(x) comes before what follows acquire(x).
void release(void* x) { if (__tsan_release) __tsan_release(x); }
void acquire(void* x) { if (__tsan_acquire) __tsan_acquire(x); }

// Where lanes meet again and again to have their memory accesses ordered. A fast lane may come for the next
// meeting before a slow one has left the last, and must not order what it did in between: hence two sides.
struct Place {
  unsigned meetings = 0;
  char sides[2] = {};
  void* now() { return &sides[meetings % 2]; }
};

// Handing over would order everything that the lanes do; ThreadSanitizer must not see it.
struct Unseen {
  Unseen() { if (AnnotateIgnoreSyncBegin) AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  ~Unseen() { if (AnnotateIgnoreSyncEnd) AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
};

thread_local unsigned me;  // this thread's index in its block

class Grid {
 public:
  explicit Grid(const Launch& launch)
      : launch(launch), threads(launch.block.x * launch.block.y * launch.block.z),
        lanes(threads), order(threads), sequence((std::size_t)launch.grid.x * launch.grid.y * launch.grid.z),
        random(launch.seed), warps((threads + 31) / 32) {
    std::iota(order.begin(), order.end(), 0u);
    std::iota(sequence.begin(), sequence.end(), 0u);
    if (launch.seed == 1) std::reverse(sequence.begin(), sequence.end());
    if (launch.seed > 1) std::shuffle(sequence.begin(), sequence.end(), random);
  }

  void run() {
    start_block();
    std::vector<std::thread> all;
    for (unsigned k = 0; k < threads; ++k) all.emplace_back([this, k] { live(k); });
    hand_over();
    for (std::thread& t : all) t.join();
  }

  void sync_threads(int line) { wait(AT_BARRIER, line, barrier.now()); }

  const Exchange& exchange(const char* intrinsic, unsigned mask, const Words& words, int line, bool orders_memory) {
    Lane& lane = lanes[me];
    if (!(mask >> me % 32 & 1))
      stuck("%s (line %d): lane %u is not in its own mask %08x", intrinsic, line, me % 32, mask);
    lane.intrinsic = intrinsic;
    lane.mask = mask;
    lane.words = words;
    wait(IN_WARP, line, orders_memory ? warps[me / 32][mask].now() : nullptr);
    return lane.said;
  }

  [[noreturn]] void stuck(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    va_list arguments;
    va_start(arguments, format);
    char text[400];
    std::vsnprintf(text, sizeof text, format, arguments);
    std::fprintf(stderr, "simt: block (%u, %u, %u): %s\n", block.x, block.y, block.z, text);
    std::_Exit(EXIT_MISUSE);
  }

 private:
  void live(unsigned index) {
    me = index;
    const unsigned width = launch.block.x, height = launch.block.y;
    thread_index = {index % width, index / width % height, index / width / height};
    block_size = launch.block;
    grid_size = launch.grid;
    take_turn();
    while (!finished) {
      block_index = block;
      launch.kernel(launch.arguments);
      if (!copies_under_way.empty()) stuck("a thread has returned without waiting for its cp.async");
      wait(RETURNED, 0, end.now());
    }
    if (!queue.empty()) hand_over();
  }

  // Until the lane may go on; `place` orders memory accesses before and after it, or is null.
  void wait(State state, int line, void* place) {
    if (place) release(place);
    lanes[me].state = state;
    lanes[me].line = line;
    hand_over();
    take_turn();
    if (place) acquire(place);
  }

  void hand_over() {
    if (queue.empty()) resolve();
    const unsigned next = queue.back();
    queue.pop_back();
    Unseen sync;
    sem_post(&lanes[next].turn);
  }

  void take_turn() {
    Unseen sync;
    while (sem_wait(&lanes[me].turn)) {}  // a signal may interrupt it
  }

  // Nobody is ready: let the lanes of complete meetings go on.
  void resolve() {
    for (unsigned first = 0; first < threads; first += 32) resolve_warp(first, std::min(threads, first + 32));
    if (collect()) return;
    if (count(AT_BARRIER) == threads && same_line()) pass_barrier();
    else if (count(RETURNED) == threads) next_block();
    else stuck("%s", who_waits().c_str());
    collect();
  }

  // A meeting of a warp is complete when every lane of its mask that has not returned is there.
  void resolve_warp(unsigned first, unsigned end) {
    for (unsigned k = first; k < end; ++k) {
      if (lanes[k].state != IN_WARP) continue;
      Exchange said{0, {}};
      bool complete = true;
      for (unsigned j = first; j < end; ++j) {
        const Lane& lane = lanes[j];
        if (!(lanes[k].mask >> (j - first) & 1) || lane.state == RETURNED) continue;
        complete = complete && lane.state == IN_WARP && lane.mask == lanes[k].mask &&
                   !std::strcmp(lane.intrinsic, lanes[k].intrinsic);
        said.lanes |= 1u << (j - first);
        said.values[j - first] = lane.words;
      }
      if (!complete) continue;
      ++warps[first / 32][lanes[k].mask].meetings;
      for (unsigned j = first; j < end; ++j) {
        if (!(said.lanes >> (j - first) & 1)) continue;
        lanes[j].said = said;
        lanes[j].state = READY;
      }
    }
  }

  // Queues the lanes that are ready, the first at the end; false where there are none.
  bool collect() {
    if (launch.seed > 1) std::shuffle(order.begin(), order.end(), random);
    for (unsigned k : order) if (lanes[k].state == READY) queue.push_back(k);
    if (launch.seed == 0) std::reverse(queue.begin(), queue.end());
    return !queue.empty();
  }

  void start_block() {
    const std::size_t b = sequence[started++];
    const unsigned width = launch.grid.x, height = launch.grid.y;
    block = {(unsigned)(b % width), (unsigned)(b / width % height), (unsigned)(b / width / height)};
    for (volatile unsigned char* p = simt_shared_begin; p < simt_shared_end; ++p) *p = launch.pattern;
  }

  void pass_barrier() {
    for (Lane& lane : lanes) lane.state = READY;
    ++barrier.meetings;
  }

  void next_block() {
    for (Lane& lane : lanes) lane.state = READY;
    ++end.meetings;
    if (started < sequence.size()) start_block();
    else finished = true;
  }

  unsigned count(State state) const {
    return (unsigned)std::count_if(lanes.begin(), lanes.end(), [=](const Lane& lane) { return lane.state == state; });
  }

  bool same_line() const {
    return std::all_of(lanes.begin(), lanes.end(), [&](const Lane& lane) { return lane.line == lanes[0].line; });
  }

  // "32 threads wait at __syncthreads (line 7), 224 have returned"
  std::string who_waits() const;

  const Launch& launch;
  const unsigned threads;
  std::vector<Lane> lanes;
  std::vector<unsigned> order, queue;  // all lanes; those whose turn comes
  std::vector<unsigned> sequence;      // of the blocks
  std::size_t started = 0;             // blocks
  bool finished = false;
  dim3 block;
  std::mt19937_64 random;
  Place barrier, end;
  std::vector<std::map<unsigned, Place>> warps;  // places by mask
};

std::string Grid::who_waits() const {
  std::vector<std::pair<std::string, unsigned>> groups;
  for (const Lane& lane : lanes) {
    char what[120];
    if (lane.state == RETURNED) std::snprintf(what, sizeof what, "have returned");
    else if (lane.state == AT_BARRIER) std::snprintf(what, sizeof what, "wait at __syncthreads (line %d)", lane.line);
    else std::snprintf(what, sizeof what, "wait at %s with mask %08x (line %d)", lane.intrinsic, lane.mask, lane.line);
    const auto known = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == what; });
    if (known == groups.end()) groups.emplace_back(what, 1);
    else ++known->second;
  }
  std::string text;
  for (const auto& [what, n] : groups) text += (text.empty() ? "" : ", ") + std::to_string(n) + " threads " + what;
  return text;
}

Grid* grid;  // the launch that is running

}  // namespace

unsigned lane() { return me % 32; }
void sync_threads(int line) { grid->sync_threads(line); }
void sync_warp(unsigned mask, int line) { grid->exchange("__syncwarp", mask, {}, line, true); }
const Exchange& exchange(const char* intrinsic, unsigned mask, const Words& words, int line) {
  return grid->exchange(intrinsic, mask, words, line, false);
}

// Ordered with every other fence, in the order in which they run.
void fence() {
  static char all_fences;
  acquire(&all_fences);
  release(&all_fences);
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  char text[300];
  std::vsnprintf(text, sizeof text, format, arguments);
  grid->stuck("%s", text);
}

void run(const Launch& launch) {
  Grid running(launch);
  grid = &running;
  running.run();
  grid = nullptr;
}

}  // namespace simt

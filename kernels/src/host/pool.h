// A few worker threads that sleep until there is a lot to do.
//
// They must not take cores from BLAS, whose own threads spin between the matrix products of a training
// step. So the workers never spin, and the caller starts on the chunks at once and never waits for a
// worker that has not begun: a worker that wakes too late finds nothing left. Waking costs tens of
// microseconds, so only work of WORTH_WAKING nanoseconds and more is shared at all.
// Which thread runs a chunk changes nothing: the chunks depend on the shape alone.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  static constexpr double WORTH_WAKING = 4e5;

  static Pool& instance() {
    static Pool* const pool = new Pool;  // never destroyed: its threads may outlive static destructors
    return *pool;
  }

  void resize(int workers) {
    std::lock_guard<std::mutex> one_caller(callers);
    wanted = workers;
  }

  // f(chunk) for every chunk in [0, chunks), in any order, returning when all are done.
  template <class F> void run(long long chunks, double nanoseconds, F f) {
    std::unique_lock<std::mutex> one_caller(callers, std::try_to_lock);
    if (!one_caller || wanted == 0 || chunks < 2 || nanoseconds < WORTH_WAKING) {
      for (long long k = 0; k < chunks; ++k) f(k);
      return;
    }
    while ((int)threads.size() < wanted) threads.emplace_back([this] { work(); });
    {
      std::lock_guard<std::mutex> guard(state);
      job = {[](void* g, long long k) { (*static_cast<F*>(g))(k); }, &f, chunks};
      next.store(0);
      open = true;
      ++generation;
    }
    awake.notify_all();
    take_chunks(job);
    std::unique_lock<std::mutex> guard(state);
    open = false;
    finished.wait(guard, [this] { return inside == 0; });
  }

 private:
  struct Job {
    void (*call)(void*, long long);
    void* closure;
    long long chunks;
  };

  void take_chunks(const Job& j) {
    for (long long k; (k = next.fetch_add(1)) < j.chunks;) j.call(j.closure, k);
  }

  void work() {
    unsigned seen = 0;
    std::unique_lock<std::mutex> guard(state);
    for (;;) {
      awake.wait(guard, [&] { return open && generation != seen; });
      seen = generation;
      ++inside;
      const Job mine = job;
      guard.unlock();
      take_chunks(mine);
      guard.lock();
      if (--inside == 0) finished.notify_one();
    }
  }

  std::mutex callers, state;
  std::condition_variable awake, finished;
  std::vector<std::thread> threads;
  std::atomic<long long> next{0};
  Job job{};
  int wanted = 0, inside = 0;
  unsigned generation = 0;
  bool open = false;
};

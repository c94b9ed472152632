// The host library's threads, which it can share with NumPy's BLAS.
//
// Two pools in one process fight for the cores: BLAS threads spin between the matrix products of a training
// step, just when the fused ops want to run. So there is one pool. OpenBLAS hands it its jobs through the
// threading callback that it offers for this (openblas_set_threads_callback_function; see host.py). Workers
// then look for news for SPIN after each job, giving way to others, because the next job is microseconds away
// and a virtual CPU that has gone to sleep is slow to wake; OpenBLAS's threads do so for 100 ms. Where BLAS
// keeps its own threads (`shared` is false), workers never spin and are woken only for long work.
//
// share(): chunks go to whoever comes. The caller starts at once and never waits for a worker that has not
//          begun. Which thread runs a chunk changes nothing, because chunks depend on the shape alone.
// together(): job k runs on thread k, all at the same time: BLAS jobs wait for each other.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  static Pool& instance() { return *current(); }

  // share() uses at most `count` workers beside the caller.
  void limit(int count) { helpers = count; }

  // Whether BLAS runs its jobs here, which at most `count` workers beside the caller do at a time.
  void serve_blas(bool yes, int count) {
    std::lock_guard<std::mutex> one_caller(callers);
    if (yes) grow(count);
    shared = yes;
  }

  // f(chunk) for every chunk in [0, chunks), in any order, returning when all are done.
  template <class F> void share(long long chunks, double nanoseconds, F f) {
    std::unique_lock<std::mutex> one_caller(callers, std::try_to_lock);
    if (!one_caller || helpers == 0 || chunks < 2 || nanoseconds < (shared ? 1e4 : 4e5)) {
      for (long long k = 0; k < chunks; ++k) f(k);
      return;
    }
    grow(helpers);
    next.store(0, std::memory_order_relaxed);
    publish({[](void* g, long long k) { (*static_cast<F*>(g))(k); }, &f, chunks, false});
    take_chunks(job);
    withdraw();
  }

  // f(k) for every k in [0, jobs), each on a thread of its own.
  template <class F> void together(int jobs, F f) {
    std::lock_guard<std::mutex> one_caller(callers);
    grow(jobs - 1);
    running.store(jobs - 1, std::memory_order_relaxed);
    publish({[](void* g, long long k) { (*static_cast<F*>(g))(k); }, &f, jobs, true});
    f(0);
    wait_for_zero(running);
    withdraw();
  }

 private:
  static constexpr auto SPIN = std::chrono::milliseconds(10);

  struct Job {
    void (*call)(void*, long long);
    void* closure;
    long long count;
    bool together;
  };

  static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // Never destroyed, since its threads outlive static destructors. A forked child has none of the threads,
  // so it gets a new pool.
  static Pool*& current() {
    static Pool* pool = [] {
      pthread_atfork(nullptr, nullptr, [] {
        Pool* const parent = current();
        current() = new Pool;
        current()->helpers = parent->helpers.load();
        current()->shared = parent->shared.load();
      });
      return new Pool;
    }();
    return pool;
  }

  void grow(int count) {
    while ((int)threads.size() < count) {
      const int index = (int)threads.size();
      threads.emplace_back([this, index] { work(index); });
      threads.back().detach();
    }
  }

  void publish(const Job& j) {
    bool wake;
    {
      std::lock_guard<std::mutex> guard(state);
      job = j;
      open = true;
      generation.fetch_add(1, std::memory_order_release);
      wake = sleepers > 0;
    }
    if (wake) awake.notify_all();
  }

  // Lets no further worker in and waits for those inside.
  void withdraw() {
    {
      std::lock_guard<std::mutex> guard(state);
      open = false;
    }
    wait_for_zero(inside);
  }

  // Spins briefly; then the thread that is waited for may need this core.
  static void wait_for_zero(const std::atomic<int>& count) {
    for (int k = 0; count.load(std::memory_order_acquire) > 0; ++k) {
      if (k < 500) relax();
      else std::this_thread::yield();
    }
  }

  void take_chunks(const Job& j) {
    for (long long k; (k = next.fetch_add(1, std::memory_order_relaxed)) < j.count;) j.call(j.closure, k);
  }

  void work(int index) {
    unsigned seen = 0;
    for (;;) {
      wait_for_news(seen);
      Job mine;
      {
        std::lock_guard<std::mutex> guard(state);
        seen = generation.load(std::memory_order_relaxed);
        if (!open || (job.together ? index + 1 >= job.count : index >= helpers)) continue;
        inside.fetch_add(1, std::memory_order_relaxed);
        mine = job;
      }
      if (mine.together) {
        mine.call(mine.closure, index + 1);
        running.fetch_sub(1, std::memory_order_release);
      } else {
        take_chunks(mine);
      }
      inside.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_news(unsigned seen) {
    if (shared) {
      const auto begin = std::chrono::steady_clock::now();
      do {
        for (int k = 0; k < 64; ++k) {
          if (generation.load(std::memory_order_acquire) != seen) return;
          relax();
        }
        std::this_thread::yield();  // another worker may have been put on this core
      } while (std::chrono::steady_clock::now() - begin < SPIN);
    }
    std::unique_lock<std::mutex> guard(state);
    ++sleepers;
    awake.wait(guard, [&] { return generation.load(std::memory_order_relaxed) != seen; });
    --sleepers;
  }

  std::mutex callers, state;
  std::condition_variable awake;
  std::vector<std::thread> threads;
  std::atomic<long long> next{0};
  std::atomic<unsigned> generation{0};
  std::atomic<int> inside{0}, running{0}, helpers{0};
  std::atomic<bool> shared{false};
  Job job{};
  int sleepers = 0;
  bool open = false;
};

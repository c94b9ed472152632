// The fast host library, and beside it mistakes that its sanitized runs must find: test_host_sanitizers.py
// executes both. A `_wrong` function has the mistake, its `_right` twin does not.
#include "../../kernels/src/host/fast.cpp"

#include <thread>

namespace {

// Long enough for workers to come, and nothing that orders one chunk after another.
float busy(index_t k) {
  volatile float x = (float)k;
  for (int i = 0; i < 20000; ++i) x = x * 0.5f + 1.0f;
  return x;
}

}  // namespace

// Chunks that add to one word, or each to its own.
EXPORT void race_wrong(float* sums, index_t chunks) {
  Pool::instance().share(chunks, 1e9, [=](index_t k) { sums[0] += busy(k); });
}
EXPORT void race_right(float* sums, index_t chunks) {
  Pool::instance().share(chunks, 1e9, [=](index_t k) { sums[k] += busy(k); });
}

// The last chunk reads and writes one element too many.
EXPORT void past_the_end_wrong(float* x, index_t n) { over_elements(n + 1, 0.5, [=](Range r) {
  for (index_t i = r.begin; i < r.end; ++i) x[i] += 1.0f;
}); }
EXPORT void past_the_end_right(float* x, index_t n) { over_elements(n, 0.5, [=](Range r) {
  for (index_t i = r.begin; i < r.end; ++i) x[i] += 1.0f;
}); }

// A store that would go around the caches, past the end.
EXPORT void stream_wrong(float* x, index_t n) { const float zeros[8] = {}; stream(x + n - 4, zeros, 8); }
EXPORT void stream_right(float* x, index_t n) { const float zeros[8] = {}; stream(x + n - 8, zeros, 8); }

EXPORT void overflow_wrong(int* x, int rows) { x[0] = rows * 65536; }
EXPORT void overflow_right(int* x, int rows) { x[0] = (int)(rows * (index_t)65536); }

// What OpenBLAS does with its callback: every job waits until all have begun, and reads what another wrote.
namespace {
struct BlasJobs { float* x; std::atomic<int>* begun; int jobs; };
void blas_job(int k, void* data, int) {
  const BlasJobs& all = **static_cast<BlasJobs**>(data);
  all.x[k] += 1.0f;
  all.begun->fetch_add(1);
  while (all.begun->load() < all.jobs) std::this_thread::yield();
  all.x[all.jobs + k] = all.x[(k + 1) % all.jobs];
}
}  // namespace
EXPORT void blas_jobs(float* x, int jobs) {
  std::atomic<int> begun{0};
  BlasJobs all{x, &begun, jobs};
  const std::vector<BlasJobs*> data(jobs, &all);
  kernels_run_blas(0, blas_job, jobs, sizeof(BlasJobs*), const_cast<BlasJobs**>(data.data()), 0);
}

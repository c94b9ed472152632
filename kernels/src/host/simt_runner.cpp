// A process that executes launches: reads one from stdin, writes the buffers back to stdout, and so on.
// kernels/simt.py is the other end. All numbers are 64-bit words in this machine's order.
//
//   launch   length and bytes of the kernel's name; grid x y z; block x y z; seed; pattern; number of buffers, of
//            arguments; for each buffer its size, its address modulo ALIGNMENT, and its bytes; for each argument
//            three words: 0, size, bits for a value, or 1, buffer, offset for a pointer into a buffer
//   answer   a word, 0; for each buffer, its bytes
//
// A mistake ends the process with a sentence on stderr.
#ifdef __linux__
#include <sched.h>
#include <unistd.h>
#endif

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "simt_runner.h"

// There only where AddressSanitizer is linked.
extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, std::size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, std::size_t);
}

namespace {

constexpr std::size_t ALIGNMENT = 256, GUARD = 256;
constexpr unsigned char GUARD_BYTE = 0xA5;

[[noreturn]] void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));
void stop(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("simt: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  std::_Exit(simt::EXIT_MISUSE);
}

void read(void* to, std::size_t n) {
  if (std::fread(to, 1, n, stdin) != n) stop("the launch ends in the middle");
}

std::uint64_t word() {
  std::uint64_t x;
  read(&x, sizeof x);
  return x;
}

dim3 triple() {
  dim3 d;
  d.x = (unsigned)word();
  d.y = (unsigned)word();
  d.z = (unsigned)word();
  return d;
}

// One array in memory of its own, at the address that the caller's has modulo ALIGNMENT, between guards: writes
// there are noticed afterwards, and by AddressSanitizer at once.
struct Buffer {
  std::size_t size, before, argument = 0;  // the last argument that points into it
  unsigned char* base;

  Buffer() {
    size = word();
    before = GUARD + word() % ALIGNMENT;
    if (posix_memalign(reinterpret_cast<void**>(&base), ALIGNMENT, before + size + GUARD))
      stop("no memory for %zu bytes", size);
    std::memset(base, GUARD_BYTE, before);
    read(data(), size);
    std::memset(data() + size, GUARD_BYTE, GUARD);
    if (__asan_poison_memory_region) {
      __asan_poison_memory_region(base, before);
      __asan_poison_memory_region(data() + size, GUARD);
    }
  }

  unsigned char* data() const { return base + before; }

  void check() const {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(base, before + size + GUARD);
    for (std::size_t k = 0; k < before + size + GUARD; k = k + 1 == before ? before + size : k + 1)
      if (base[k] != GUARD_BYTE)
        stop("wrote outside argument %zu, at byte %lld of %zu", argument, (long long)k - (long long)before, size);
  }
};

const simt::Kernel& find(const std::string& name) {
  for (unsigned k = 0; k < simt::kernel_count; ++k)
    if (name == simt::kernels[k].name) return simt::kernels[k];
  stop("the source has no such kernel");
}

std::vector<simt::Argument> arguments(const simt::Kernel& kernel, std::size_t count, std::vector<Buffer>& buffers) {
  if (count != kernel.count) stop("takes %u arguments, got %zu", kernel.count, count);
  std::vector<simt::Argument> all(count);
  for (std::size_t k = 0; k < count; ++k) {
    const std::uint64_t kind = word(), first = word(), second = word();
    const simt::Parameter& p = kernel.parameters[k];
    if (kind == 0) {
      if (first != p.size) stop("argument %zu has %u bytes, got %u", k, p.size, (unsigned)first);
      all[k].bits = second;
    } else {
      if (!p.is_pointer) stop("argument %zu is a value, got an array", k);
      buffers.at(first).argument = k;
      all[k].pointer = buffers[first].data() + second;
    }
  }
  return all;
}

// Where only one thread of a launch runs at a time: on one core, handing over wakes no other.
void stay_on_one_core() {
#ifdef __linux__
  cpu_set_t may, one;
  CPU_ZERO(&one);
  if (sched_getaffinity(0, sizeof may, &may)) return;
  int skip = (int)(getpid() % CPU_COUNT(&may)), core = 0;  // several runners, several cores
  while (!CPU_ISSET(core, &may) || skip-- > 0) ++core;
  CPU_SET(core, &one);
  sched_setaffinity(0, sizeof one, &one);
#endif
}

// CUDA's limits.
void check_shape(const simt::Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const std::uint64_t threads = (std::uint64_t)block.x * block.y * block.z;
  if (threads < 1 || threads > 1024) stop("a block has 1 to 1024 threads, got %u x %u x %u", block.x, block.y, block.z);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    stop("a grid has 1 to 2147483647 x 65535 x 65535 blocks, got %u x %u x %u", grid.x, grid.y, grid.z);
}

void serve_one(std::uint64_t name_length) {
  std::string name(name_length, '\0');
  read(&name[0], name.size());
  const simt::Kernel& kernel = find(name);
  simt::Launch launch{};
  launch.kernel = kernel.call;
  launch.grid = triple();
  launch.block = triple();
  check_shape(launch);
  launch.seed = word();
  launch.pattern = (unsigned char)word();
  const std::size_t buffer_count = word(), argument_count = word();
  std::vector<Buffer> buffers(buffer_count);
  const std::vector<simt::Argument> all = arguments(kernel, argument_count, buffers);
  launch.arguments = all.data();
  simt::run(launch);
  for (const Buffer& b : buffers) b.check();
  const std::uint64_t done = 0;
  std::fwrite(&done, sizeof done, 1, stdout);
  for (const Buffer& b : buffers) {
    std::fwrite(b.data(), 1, b.size, stdout);
    std::free(b.base);
  }
  std::fflush(stdout);
}

}  // namespace

int main() {
  if (simt::one_thread_at_a_time) stay_on_one_core();
  std::uint64_t name_length;
  while (std::fread(&name_length, sizeof name_length, 1, stdin) == 1) serve_one(name_length);
}

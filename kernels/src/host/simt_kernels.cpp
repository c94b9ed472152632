// The kernels of one source file, SIMT_SOURCE, and the table of them that simt_runner.cpp looks names up in.
// SIMT_TABLE is a file of lines SIMT_ENTRY(name), which simt.cmake writes. With SIMT_PLAIN the source is ordinary
// C++ that knows nothing of CUDA, such as fast.cpp, and a launch is one call.
#ifdef SIMT_PLAIN
#include SIMT_SOURCE
#include "simt_runner.h"

const bool simt::one_thread_at_a_time = false;
void simt::run(const Launch& launch) { launch.kernel(launch.arguments); }

namespace {
#else
#include "simt_runner.h"

namespace {
#include SIMT_SOURCE
#endif

template <class T> T argument(simt::Argument a) {
  if constexpr (std::is_pointer_v<T>) return (T)a.pointer;
  else return simt::from_bits<T>(a.bits);
}

template <auto f> struct Entry;
template <class... A, void (*f)(A...)> struct Entry<f> {
  static constexpr simt::Parameter parameters[sizeof...(A) + 1] = {{sizeof(A), std::is_pointer_v<A>}...};
  static constexpr unsigned count = sizeof...(A);
  template <std::size_t... K> static void spread(const simt::Argument* a, std::index_sequence<K...>) {
    f(argument<A>(a[K])...);
  }
  static void call(const simt::Argument* a) { spread(a, std::index_sequence_for<A...>{}); }
};
}  // namespace

namespace simt {
#define SIMT_ENTRY(name) {#name, Entry<::name>::call, Entry<::name>::parameters, Entry<::name>::count},
const Kernel kernels[] = {
#include SIMT_TABLE
};
const unsigned kernel_count = sizeof kernels / sizeof *kernels;
}  // namespace simt

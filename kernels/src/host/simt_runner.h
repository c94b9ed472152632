// What the parts of a runner know of each other: simt.cpp executes, simt_runner.cpp talks, simt_kernels.cpp has
// the kernels.
#pragma once
#include "simt.h"

namespace simt {

constexpr int EXIT_MISUSE = 70;  // a message on stderr says what the kernel or the caller did wrong

union Argument {
  void* pointer;
  std::uint64_t bits;
};

struct Parameter {
  unsigned size;
  bool is_pointer;
};

struct Kernel {
  const char* name;
  void (*call)(const Argument*);
  const Parameter* parameters;
  unsigned count;
};

struct Launch {
  void (*kernel)(const Argument*);
  const Argument* arguments;
  dim3 grid, block;
  std::uint64_t seed;     // of the order of blocks and threads: 0 ascending, 1 descending, else shuffled
  unsigned char pattern;  // what fresh shared memory holds
};

void run(const Launch&);
extern const bool one_thread_at_a_time;  // whether run() keeps all threads but one waiting

extern const Kernel kernels[];
extern const unsigned kernel_count;

}  // namespace simt

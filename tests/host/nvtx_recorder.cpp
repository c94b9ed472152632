// An NVTX injection library: the interface through which Nsight Systems listens.
//
// In a process with NVTX_INJECTION64_PATH=<this library>, NVTX calls InitializeInjectionNvtx2 at its first use, and
// we put our functions into its table. Each appends a line to the file named by NVTX_RECORD:
//   domain <name>  |  push <thread> <domain> <colour, 8 hexadecimal digits> <message>  |  pop <thread> <domain>
// The declarations are those needed from nvtx3/nvToolsExt.h and nvtx3/nvtxDetail/nvtxTypes.h (NVTX 3).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <pthread.h>

namespace {

struct EventAttributes {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  uint64_t payload;
  int32_t message_type;
  const char* message;  // or, in NVTX, a wide or a registered string
};
static_assert(sizeof(EventAttributes) == 48, "nvtxEventAttributes_v2");

constexpr int32_t COLOR_ARGB = 1, MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3;
constexpr uint32_t TABLE_OF_CALLBACKS = 1;
constexpr int MODULE_CORE2 = 5;
enum Core2 { RANGE_PUSH = 4, RANGE_POP = 5, REGISTER_STRING = 10, DOMAIN_CREATE = 12 };

using Function = void (*)();
struct CallbackTable {
  size_t size;
  int (*get_module)(int module, Function*** table, unsigned* entries);
};

FILE* record() {
  static FILE* const file = fopen(getenv("NVTX_RECORD"), "a");
  return file;
}

unsigned long thread() { return (unsigned long)pthread_self(); }

// What NVTX takes for handles are copies of the names.
const char* domain_create(const char* name) {
  fprintf(record(), "domain %s\n", name);
  return strdup(name);
}

const char* register_string(const char*, const char* string) { return strdup(string); }

int range_push(const char* domain, const EventAttributes* event) {
  const bool text = event->message_type == MESSAGE_ASCII || event->message_type == MESSAGE_REGISTERED;
  fprintf(record(), "push %lu %s %08x %s\n", thread(), domain, event->color_type == COLOR_ARGB ? event->color : 0,
          text ? event->message : "?");
  return 0;
}

int range_pop(const char* domain) {
  fprintf(record(), "pop %lu %s\n", thread(), domain);
  return 0;
}

}  // namespace

extern "C" int InitializeInjectionNvtx2(const void* (*get_export_table)(uint32_t)) {
  const auto* callbacks = static_cast<const CallbackTable*>(get_export_table(TABLE_OF_CALLBACKS));
  Function** table;
  unsigned entries;
  if (!record() || !callbacks || !callbacks->get_module(MODULE_CORE2, &table, &entries) || entries <= DOMAIN_CREATE)
    return 0;
  *table[RANGE_PUSH] = reinterpret_cast<Function>(range_push);
  *table[RANGE_POP] = reinterpret_cast<Function>(range_pop);
  *table[REGISTER_STRING] = reinterpret_cast<Function>(register_string);
  *table[DOMAIN_CREATE] = reinterpret_cast<Function>(domain_create);
  return 1;
}

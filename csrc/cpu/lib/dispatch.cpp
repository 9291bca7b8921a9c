#include "cpu/lib/dispatch.h"

#include <stdarg.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace napo {

void fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw std::invalid_argument(message);  // pybind11 turns it into ValueError
}

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

bool runs_here(Isa isa) {
#ifdef NAPO_X86_ISAS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
#ifdef NAPO_BF16_ISA
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
#else
    case Isa::avx512_bf16: return false;
#endif
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    case Isa::portable: return true;
  }
#endif
  return isa == Isa::portable;
}

Isa parse(const char* source, const char* name) {
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      NAPO_CHECK(runs_here(static_cast<Isa>(i)), "%s: this machine or this build has no %s", source, name);
      return static_cast<Isa>(i);
    }
  }
  fail("%s: expected portable, avx2, avx512 or avx512_bf16, got '%.80s'", source, name);
}

Isa initial() {
  if (const char* wanted = std::getenv("NAPO_CPU_ISA"); wanted != nullptr && *wanted != '\0') {
    return parse("environment variable NAPO_CPU_ISA", wanted);
  }
  for (Isa isa : {Isa::avx512_bf16, Isa::avx512, Isa::avx2}) {
    if (runs_here(isa)) return isa;
  }
  return Isa::portable;
}

std::atomic<int>& current() {
  static std::atomic<int> isa{static_cast<int>(initial())};
  return isa;
}

}  // namespace

Isa cpu_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }
const char* cpu_isa_name() { return kNames[static_cast<int>(cpu_isa())]; }
void set_cpu_isa(const char* name) { current().store(static_cast<int>(parse("name", name))); }

}  // namespace napo

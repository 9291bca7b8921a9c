// One kernel, several instruction sets: every csrc/cpu/<room>.cpp is compiled once for each of them, in the namespace
// napo::NAPO_ISA, and the set is chosen at run time.
//
//   room.h    NAPO_DECLARE_KERNEL(my_kernel, (const float* x, int64_t n, int threads))
//   room.cpp  namespace napo::NAPO_ISA { void my_kernel(const float* x, int64_t n, int threads) {...} }
//   bindings  NAPO_CALL_KERNEL(my_kernel, (x, n, threads));
#pragma once

#include "common.h"

namespace napo {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best set that this machine has, or the one named by the environment variable NAPO_CPU_ISA (read once).
Isa cpu_isa();
const char* cpu_isa_name();
// Changes it, for tests and benchmarks. Raises ValueError for a set that is unknown or that this machine lacks.
void set_cpu_isa(const char* name);

}  // namespace napo

#ifdef NAPO_X86_ISAS
#define NAPO_DECLARE_KERNEL(name, parameters) \
  namespace napo::portable {                  \
  void name parameters;                       \
  }                                           \
  namespace napo::avx2 {                      \
  void name parameters;                       \
  }                                           \
  namespace napo::avx512 {                    \
  void name parameters;                       \
  }
#define NAPO_CALL_KERNEL(name, arguments)                              \
  do {                                                                 \
    switch (::napo::cpu_isa()) {                                       \
      case ::napo::Isa::avx512_bf16:                                   \
      case ::napo::Isa::avx512: ::napo::avx512::name arguments; break; \
      case ::napo::Isa::avx2: ::napo::avx2::name arguments; break;     \
      default: ::napo::portable::name arguments;                       \
    }                                                                  \
  } while (0)
#else
#define NAPO_DECLARE_KERNEL(name, parameters) \
  namespace napo::portable {                  \
  void name parameters;                       \
  }
#define NAPO_CALL_KERNEL(name, arguments) ::napo::portable::name arguments
#endif

// For a room that is compiled once more where the machine multiplies bfloat16.
#ifdef NAPO_BF16_ISA
#define NAPO_DECLARE_KERNEL_BF16(name, parameters) \
  NAPO_DECLARE_KERNEL(name, parameters)            \
  namespace napo::avx512_bf16 {                    \
  void name parameters;                            \
  }
#define NAPO_CALL_KERNEL_BF16(name, arguments)           \
  do {                                                   \
    if (::napo::cpu_isa() == ::napo::Isa::avx512_bf16) { \
      ::napo::avx512_bf16::name arguments;               \
    } else {                                             \
      NAPO_CALL_KERNEL(name, arguments);                 \
    }                                                    \
  } while (0)
#else
#define NAPO_DECLARE_KERNEL_BF16(name, parameters) NAPO_DECLARE_KERNEL(name, parameters)
#define NAPO_CALL_KERNEL_BF16(name, arguments) NAPO_CALL_KERNEL(name, arguments)
#endif

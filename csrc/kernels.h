// How the header of an op (csrc/<op>.h) says what crosses the border from Python: structs of arguments, and the kernels
// that take them.
//
//   struct AddArgs {
//     float* total;      // (rows, width), in and out
//     Tensor<2> summand;  // (rows, width)
//     NAPO_FIELDS(AddArgs, total, summand)
//   };
//   NAPO_CPU_KERNEL(add, AddArgs)   void add(const AddArgs& args, int threads), in cpu/<op>.cpp for every instruction
//   set NAPO_CUDA_KERNEL(add, AddArgs)  void add(const AddArgs& args, void* stream), in cuda/<op>.cu
//
// Python passes a mapping with exactly the names of the fields, and border.h fills the struct from it by these names.
// A pointer comes as a contiguous tensor of its type or None; Tensor<n> brings dtype, sizes and strides along.
#pragma once

#include "common.h"
#include "cpu/lib/dispatch.h"

// All fields of the struct that it stands in, in their order; a field that is missing here does not compile (border.h).
#define NAPO_FIELDS(name, ...)                \
  static constexpr const char* kName = #name; \
  template <class Visitor>                    \
  auto visit_fields(const Visitor& visit) {   \
    return visit(#__VA_ARGS__, __VA_ARGS__);  \
  }

// A kernel in the namespaces of the instruction sets that its room is compiled for, and napo::cpu::<name>, which runs
// the best one for this machine.
#define NAPO_DECLARE(isa, name, Args)       \
  namespace napo::isa {                     \
  void name(const Args& args, int threads); \
  }
#define NAPO_CHOOSE(name, Args, ...)                \
  namespace napo::cpu {                             \
  inline void name(const Args& args, int threads) { \
    __VA_ARGS__                                     \
    ::napo::portable::name(args, threads);          \
  }                                                 \
  }
#define NAPO_FROM(isa, name) \
  if (cpu_isa() >= Isa::isa) return ::napo::isa::name(args, threads);

#ifdef NAPO_X86_ISAS
#define NAPO_DECLARE_ALL(name, Args) \
  NAPO_DECLARE(portable, name, Args) \
  NAPO_DECLARE(avx2, name, Args)     \
  NAPO_DECLARE(avx512, name, Args)
#define NAPO_FROM_ANY(name) NAPO_FROM(avx512, name) NAPO_FROM(avx2, name)
#else
#define NAPO_DECLARE_ALL(name, Args) NAPO_DECLARE(portable, name, Args)
#define NAPO_FROM_ANY(name)
#endif

#define NAPO_CPU_KERNEL(name, Args) \
  NAPO_DECLARE_ALL(name, Args)      \
  NAPO_CHOOSE(name, Args, NAPO_FROM_ANY(name))

// For a room that is compiled once more where the machine multiplies bfloat16.
#ifdef NAPO_BF16_ISA
#define NAPO_CPU_KERNEL_BF16(name, Args) \
  NAPO_DECLARE_ALL(name, Args)           \
  NAPO_DECLARE(avx512_bf16, name, Args)  \
  NAPO_CHOOSE(name, Args, NAPO_FROM(avx512_bf16, name) NAPO_FROM_ANY(name))
#else
#define NAPO_CPU_KERNEL_BF16(name, Args) NAPO_CPU_KERNEL(name, Args)
#endif

#define NAPO_CUDA_KERNEL(name, Args)         \
  namespace napo::cuda {                     \
  void name(const Args& args, void* stream); \
  }

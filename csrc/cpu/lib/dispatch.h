// Every csrc/cpu/<op>.cpp is compiled once for each instruction set, in the namespace napo::NAPO_ISA, and the set is
// chosen at run time (kernels.h declares the kernels).
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

// Arithmetic on vectors, for the instruction set whose simd_*.h the file has included already, or else for any
// processor.
//
// What is written in these operations is compiled once for each instruction set, so all of it has internal linkage and
// includes no header of the C++ standard library: the linker would keep one copy of an inline function, and perhaps the
// one with wider instructions in it.
#ifndef SSU_BRIDGE_CPU_SIMD_H_
#define SSU_BRIDGE_CPU_SIMD_H_

#if !defined(SSU_BRIDGE_CPU_SIMD_AVX512_H_) && !defined(SSU_BRIDGE_CPU_SIMD_AVX2_H_)
#include "cpu/simd_portable.h"
#endif

#endif  // SSU_BRIDGE_CPU_SIMD_H_

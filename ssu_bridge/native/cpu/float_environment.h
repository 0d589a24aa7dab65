// IEEE 754 arithmetic for the length of a scope, whatever the thread had set.
#ifndef SSU_BRIDGE_CPU_FLOAT_ENVIRONMENT_H_
#define SSU_BRIDGE_CPU_FLOAT_ENVIRONMENT_H_

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

namespace ssu_bridge {

// XLA's threads flush subnormal numbers to zero, Torch's do on request, and others do not. The same call must give the
// same bits on all of them.
class FloatEnvironment {
 public:
  FloatEnvironment() : before_(get()) { set(kIeee); }
  ~FloatEnvironment() { set(before_); }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if defined(__x86_64__) || defined(__i386__)
  using Word = unsigned;
  static constexpr Word kIeee = 0x1f80;  // every exception masked, round to nearest, subnormals honoured
  static Word get() { return _mm_getcsr(); }
  static void set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kIeee = 0;
  static Word get() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(Word word) { asm volatile("msr fpcr, %0" : : "r"(word)); }
#else
  using Word = int;
  static constexpr Word kIeee = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif

  Word before_;
};

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_FLOAT_ENVIRONMENT_H_

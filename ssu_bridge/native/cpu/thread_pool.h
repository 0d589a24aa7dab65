// The process's worker threads, shared by every kernel and every calling thread.
#ifndef SSU_BRIDGE_CPU_THREAD_POOL_H_
#define SSU_BRIDGE_CPU_THREAD_POOL_H_

#include <cstdint>

namespace ssu_bridge {

// A piece of work cut into chunks 0..count-1, which may run in any order and at the same time.
struct ChunkedWork {
  // `worker` is below the number of threads that run_chunks was called with, and no two threads have the same at a
  // time. An exception would end the process: what may throw, such as an allocation, comes before run_chunks.
  virtual void run_chunk(int64_t chunk, int worker) noexcept = 0;

 protected:
  ~ChunkedWork() = default;
};

// Threads that may work at once, the caller's included: SSU_BRIDGE_NUM_THREADS, or else the cores this process may use.
// Raises ValueError when the variable does not hold a positive number. Read once.
int thread_count();

// Runs every chunk, on at most `threads` threads, one of which is the caller's. Returns when all are done. May be
// called from many threads at once; progress never depends on a worker, since each caller takes chunks of its own work.
void run_chunks(ChunkedWork& work, int64_t count, int threads);

}  // namespace ssu_bridge

#endif  // SSU_BRIDGE_CPU_THREAD_POOL_H_

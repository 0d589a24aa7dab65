#include "cpu/thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <tvm/ffi/error.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include "cpu/usable_cores.h"

namespace ssu_bridge {
namespace {

// One call of run_chunks. Lives on the caller's stack: the caller waits until no worker holds it.
struct Job {
  Job(ChunkedWork& work, int64_t count, int helpers) : work(work), count(count), helpers_wanted(helpers) {}

  void take_chunks(int worker) {
    for (int64_t chunk; (chunk = next_chunk.fetch_add(1, std::memory_order_relaxed)) < count;)
      work.run_chunk(chunk, worker);
  }

  ChunkedWork& work;
  const int64_t count;
  std::atomic<int64_t> next_chunk{0};

  // Under the pool's mutex.
  int helpers_wanted;
  int helpers_inside = 0;
  int helpers_so_far = 0;
  std::condition_variable all_left;
  Job* later = nullptr;
};

class ThreadPool {
 public:
  void run(ChunkedWork& work, int64_t count, int helpers) {
    Job job(work, count, helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_workers();
      append(job);
    }
    wake(helpers);
    job.take_chunks(0);
    std::unique_lock<std::mutex> lock(mutex_);
    remove(job);
    job.all_left.wait(lock, [&] { return job.helpers_inside == 0; });
  }

 private:
  // Each woken worker wakes others in its turn, so that one caller does not pay for a large pool.
  void wake(int wanted) {
    for (int i = 0; i < std::min(wanted, 2); ++i) job_posted_.notify_one();
  }

  void start_workers() {
    if (started_) return;
    started_ = true;
    // Signals are for the threads that the program knows of.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int i = 1; i < thread_count(); ++i) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      // No more threads (std::system_error) or memory for one (std::bad_alloc). The callers do the work that the
      // missing threads would have done.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      job_posted_.wait(lock, [&] { return first_ != nullptr; });
      Job& job = *first_;
      ++job.helpers_inside;
      int worker = ++job.helpers_so_far;
      if (--job.helpers_wanted == 0) remove(job);
      int wanted = first_ ? first_->helpers_wanted : 0;
      lock.unlock();
      wake(wanted);
      job.take_chunks(worker);
      lock.lock();
      // No chunk is left, so no other worker is needed.
      remove(job);
      // Under the lock, since the caller may destroy the job as soon as it sees the last helper gone.
      if (--job.helpers_inside == 0) job.all_left.notify_one();
    }
  }

  void append(Job& job) {
    Job** end = &first_;
    while (*end) end = &(*end)->later;
    *end = &job;
  }

  void remove(Job& job) {
    for (Job** link = &first_; *link; link = &(*link)->later) {
      if (*link != &job) continue;
      *link = job.later;
      job.later = nullptr;
      return;
    }
  }

  std::mutex mutex_;
  std::condition_variable job_posted_;
  Job* first_ = nullptr;  // jobs that still want helpers, oldest first
  bool started_ = false;
};

// Never destroyed: at exit its threads may still wait on it.
alignas(ThreadPool) unsigned char pool_memory[sizeof(ThreadPool)];

ThreadPool& pool() {
  static ThreadPool* made = [] {
    // A child of fork has none of the threads, and perhaps a mutex that one of them held: it starts afresh.
    pthread_atfork(nullptr, nullptr, [] { new (pool_memory) ThreadPool; });
    return new (pool_memory) ThreadPool;
  }();
  return *made;
}

int read_thread_count() {
  const char* text = std::getenv("SSU_BRIDGE_NUM_THREADS");
  if (!text || !*text) return usable_cores();
  char* end = nullptr;
  long count = std::strtol(text, &end, 10);
  if (*end || count < 1 || count > 4096)
    TVM_FFI_THROW(ValueError) << "SSU_BRIDGE_NUM_THREADS must be a number from 1 to 4096, got '" << text << "'";
  return static_cast<int>(count);
}

}  // namespace

int thread_count() {
  static const int count = read_thread_count();
  return count;
}

void run_chunks(ChunkedWork& work, int64_t count, int threads) {
  threads = static_cast<int>(std::min<int64_t>({threads, thread_count(), count}));
  if (threads > 1) return pool().run(work, count, threads - 1);
  for (int64_t chunk = 0; chunk < count; ++chunk) work.run_chunk(chunk, 0);
}

}  // namespace ssu_bridge

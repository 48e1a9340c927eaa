#include "support/thread_pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace kvmem {

struct ThreadPool::Shared {
  std::vector<std::thread> workers;

  // Held by the caller that has the workers (P3).
  std::mutex caller;

  // Guarded by mutex.
  std::mutex mutex;
  std::condition_variable wake;
  std::condition_variable done;
  uint64_t job = 0;
  int busy = 0;
  bool open = false;
  bool stop = false;
  Item item = nullptr;
  void* context = nullptr;
  size_t n = 0;

  std::atomic<size_t> next{0};

  void Work();
  void Stop();
  // Takes items of the current job until none is left.
  void Run(Item run, void* with, size_t count);
};

ThreadPool::ThreadPool(int threads)
    : threads_(threads < 1 ? 1 : threads), owner_(getpid()), shared_(std::make_unique<Shared>()) {
  Shared* const shared = shared_.get();
  shared->workers.reserve(static_cast<size_t>(threads_ - 1));
  try {
    for (int i = 1; i < threads_; ++i) {
      shared->workers.emplace_back([shared] { shared->Work(); });
    }
  } catch (...) {
    shared->Stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() == owner_) {
    shared_->Stop();
  } else {
    // P2: the threads are the parent's, and the condition variable still counts them as waiting:
    // here it can neither be joined nor destroyed, so the child leaves it where it is.
    static_cast<void>(shared_.release());
  }
}

void ThreadPool::Shared::Stop() {
  {
    std::lock_guard lock(mutex);
    stop = true;
  }
  wake.notify_all();
  for (std::thread& worker : workers) worker.join();
}

void ThreadPool::Shared::Run(Item run, void* with, size_t count) {
  for (size_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
       i = next.fetch_add(1, std::memory_order_relaxed)) {
    run(with, i);
  }
}

void ThreadPool::For(size_t n, Item item, void* context) {
  Shared& shared = *shared_;
  const bool alone = n < 2 || threads_ == 1 || getpid() != owner_ || !shared.caller.try_lock();
  if (alone) {
    for (size_t i = 0; i < n; ++i) item(context, i);
    return;
  }
  std::lock_guard release(shared.caller, std::adopt_lock);
  {
    std::lock_guard lock(shared.mutex);
    shared.item = item;
    shared.context = context;
    shared.n = n;
    shared.next.store(0, std::memory_order_relaxed);
    shared.open = true;
    ++shared.job;
  }
  shared.wake.notify_all();
  shared.Run(item, context, n);
  std::unique_lock lock(shared.mutex);
  shared.open = false;  // a worker that wakes from here on finds no job
  shared.done.wait(lock, [&shared] { return shared.busy == 0; });
}

void ThreadPool::Shared::Work() {
  uint64_t seen = 0;
  std::unique_lock lock(mutex);
  while (true) {
    wake.wait(lock, [&] { return stop || (open && job != seen); });
    if (stop) return;
    seen = job;
    ++busy;
    const Item run = item;
    void* const with = context;
    const size_t count = n;
    lock.unlock();
    Run(run, with, count);
    lock.lock();
    if (--busy == 0) done.notify_one();
  }
}

}  // namespace kvmem

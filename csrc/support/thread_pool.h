// A few threads that wait for one kind of work: a numbered list of items.
//
// Thread safety: For() may be called from any thread, also by several at once.
//
// Invariants
//   P1  An item runs exactly once, and has run when For() returns; its writes are seen by the
//       caller.
//   P2  The caller works too, so For() ends even when no worker ever wakes: after fork() the
//       child has no workers and runs every item itself. Its destructor returns there too.
//   P3  One caller has the workers at a time; another that comes meanwhile runs its items itself
//       rather than wait.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <memory>

namespace kvmem {

class ThreadPool {
 public:
  // `item` must not throw.
  using Item = void (*)(void* context, size_t index);

  // `threads` counts the caller: 1 starts none. Throws std::system_error when a thread cannot be
  // started (those already started are joined).
  explicit ThreadPool(int threads);
  // REQUIRES: no For() is running.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Runs item(context, i) for i in [0, n).
  void For(size_t n, Item item, void* context);

 private:
  struct Shared;

  // Immutable after construction.
  const int threads_;
  const pid_t owner_;
  std::unique_ptr<Shared> shared_;
};

}  // namespace kvmem

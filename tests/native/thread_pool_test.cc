// Every item runs once, for several callers at a time and in a forked child, where the pool can
// also be destroyed.
#include "support/thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include "check.h"

namespace kvmem {
namespace {

constexpr size_t kItems = 97;

bool RunsEachOnce(ThreadPool& pool, size_t n) {
  std::vector<int> runs(n);
  pool.For(
      n, [](void* context, size_t i) { ++(*static_cast<std::vector<int>*>(context))[i]; }, &runs);
  for (int count : runs) {
    if (count != 1) return false;
  }
  return true;
}

void TestEachItemRunsOnce() {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (size_t n = 0; n < 200; ++n) CHECK(RunsEachOnce(pool, n));
  }
}

void TestSeveralCallers() {
  ThreadPool pool(3);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&pool] {
      for (int round = 0; round < 300; ++round) CHECK(RunsEachOnce(pool, kItems));
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// A child that hangs is ended by its alarm, and then has not exited with 0.
void TestForkedChild() {
  auto* const pool = new ThreadPool(3);
  CHECK(RunsEachOnce(*pool, kItems));
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    alarm(20);
    const bool ran = RunsEachOnce(*pool, kItems);
    delete pool;
    _exit(ran ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(RunsEachOnce(*pool, kItems));
  delete pool;
}

}  // namespace
}  // namespace kvmem

int main() {
  kvmem::TestEachItemRunsOnce();
  kvmem::TestSeveralCallers();
  kvmem::TestForkedChild();
  return 0;
}

// fuzz_disk.cc without a fuzzer: random edits, sealed and not; and that it sees a wrong byte.
#include "fuzz_disk.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <random>
#include <vector>

#include "check.h"

namespace {

constexpr int kInputs = 800;

std::vector<uint8_t> Draw(std::mt19937* draw) {
  std::vector<uint8_t> input = {static_cast<uint8_t>((*draw)())};
  const auto n_edits = 1 + (*draw)() % 4;
  for (unsigned edit = 0; edit < n_edits; ++edit) {
    const auto op = static_cast<uint8_t>((*draw)() % 7);
    // A byte or four, not 255 of them: most of what one damages must stay as it is.
    const uint8_t n = (*draw)() % 2 == 0 ? 1 : 4;
    std::vector<uint8_t> some = {op, static_cast<uint8_t>((*draw)()),
                                 static_cast<uint8_t>((*draw)() % (op == 0 ? 24 : 160)), n};
    if (op > 1) some.resize(op == 6 ? 2 : 3);
    if (op <= 1) {
      for (uint8_t i = 0; i < n; ++i) some.push_back(static_cast<uint8_t>((*draw)()));
    }
    input.insert(input.end(), some.begin(), some.end());
  }
  return input;
}

// Expecting another byte of one block ends the process.
void TestAWrongByteIsSeen() {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    setenv("KVMEM_FUZZ_BREAK", "1", 1);
    signal(SIGABRT, SIG_DFL);
    LLVMFuzzerInitialize(nullptr, nullptr);
    const uint8_t nothing = 0;
    LLVMFuzzerTestOneInput(&nothing, 1);
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}

void TestRandomEdits() {
  LLVMFuzzerInitialize(nullptr, nullptr);
  const uint8_t nothing = 0;
  LLVMFuzzerTestOneInput(&nothing, 1);
  CHECK(kvmem::fuzz_counts.served == 6 && kvmem::fuzz_counts.refused == 0);
  std::mt19937 draw(20261126);
  for (int i = 0; i < kInputs; ++i) {
    const std::vector<uint8_t> input = Draw(&draw);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  const kvmem::FuzzCounts& counts = kvmem::fuzz_counts;
  CHECK(counts.opened > kInputs / 2 && counts.opened < counts.inputs);
  CHECK(counts.served > kInputs && counts.refused > kInputs / 10);
}

}  // namespace

int main() {
  TestAWrongByteIsSeen();
  TestRandomEdits();
  return 0;
}

// A disk store opened over bytes that anybody may have chosen: tests/native/fuzz_disk.cc. libFuzzer
// calls it (make fuzz), and fuzz_disk_test.cc with inputs of its own, in every native test run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvmem {

// What became of the inputs so far; a fuzzer that never serves a block has not looked at much.
struct FuzzCounts {
  uint64_t inputs, opened, recovered, served, refused;
};
extern FuzzCounts fuzz_counts;

}  // namespace kvmem

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t n);

// The real kernels on a real GPU, small enough for compute-sanitizer: random layouts by every
// method, bytes and checksums compared, what lies beside them untouched. Built and run by
// benchmarks/gpu.sh; without a GPU it says so and ends with 77.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../arena_bytes.h"
#include "../check.h"
#include "copy/cuda/gpu_copier.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

void Cuda(cudaError_t error) {
  if (error != cudaSuccess) std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  CHECK(error == cudaSuccess);
}

std::vector<int32_t> Draw(size_t n, size_t below, std::mt19937_64& random) {
  std::vector<int32_t> all(below);
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), random);
  all.resize(n);
  return all;
}

void RoundTrip(uint64_t seed, CopyMethod store, CopyMethod load) {
  std::mt19937_64 random(seed);
  const size_t n_layers = 1 + random() % 6;
  const size_t n_blocks = 4 + random() % 60;
  const uint64_t unit = random() % 2 == 0 ? 4096 : 1024;
  std::vector<Layer> layers;
  uint64_t memory_bytes = 0;
  uint64_t bytes = 0;
  for (size_t i = 0; i < n_layers; ++i) {
    const uint64_t piece = unit * (1 + random() % 9);
    layers.push_back({nullptr, piece + 16 * (random() % 3), piece});
    memory_bytes += layers.back().stride * n_blocks;
    bytes += piece;
  }
  std::byte* memory = nullptr;
  Cuda(cudaMalloc(reinterpret_cast<void**>(&memory), memory_bytes));
  std::byte* base = memory;
  for (Layer& layer : layers) {
    layer.base = base;
    base += layer.stride * n_blocks;
  }
  std::vector<std::byte> device(memory_bytes);
  for (auto& byte : device) byte = static_cast<std::byte>(random());
  Cuda(cudaMemcpy(memory, device.data(), memory_bytes, cudaMemcpyHostToDevice));
  {
    const size_t n_slots = 4 + random() % 60;
    TestArena arena(n_slots, bytes);
    std::string error;
    const auto copier =
        GpuCopier::Make(arena.table(), arena.header_bytes(), arena.bytes(), 0, 4, &error);
    if (copier == nullptr) std::fprintf(stderr, "%s\n", error.c_str());
    CHECK(copier != nullptr);
    CHECK(copier->RegisterLayers(0, layers, n_blocks, &error));
    CHECK(copier->SetMethod(0, CopyWay::kToHost, store));
    CHECK(copier->SetMethod(0, CopyWay::kToDevice, load));
    const size_t n = 1 + random() % std::min(n_blocks, n_slots);
    const std::vector<int32_t> sources = Draw(n, n_blocks, random);
    const std::vector<int32_t> targets = Draw(n, n_blocks, random);
    const std::vector<int32_t> slots = Draw(n, n_slots, random);
    const std::vector<uint64_t> generations(n, 1);
    const std::vector<std::byte> keys(n * kKeyBytes);
    CopyRequest request{0, n, sources.data(), slots.data(), generations.data(), keys.data()};
    std::vector<CopyStatus> status(n);
    std::vector<uint64_t> checksums(n);
    copier->Store(request, nullptr, status.data(), checksums.data());
    std::vector<std::byte> wanted = device;
    for (size_t i = 0; i < n; ++i) {
      CHECK(status[i] == CopyStatus::kOk);
      const std::byte* row = arena.table().Data(static_cast<uint64_t>(slots[i]));
      CHECK(checksums[i] == Xxh3_64(row, bytes));
      for (const Layer& layer : layers) {
        const auto offset = static_cast<size_t>(layer.base - memory);
        const auto source = offset + static_cast<size_t>(sources[i]) * layer.stride;
        const auto target = offset + static_cast<size_t>(targets[i]) * layer.stride;
        CHECK(std::memcmp(row, device.data() + source, layer.piece) == 0);
        std::memcpy(wanted.data() + target, row, layer.piece);
        row += layer.piece;
      }
    }
    const std::vector<uint8_t> verify(n, 1);
    request.block_ids = targets.data();
    copier->Load(request, verify.data(), nullptr, status.data());
    for (const CopyStatus one : status) CHECK(one == CopyStatus::kOk);
    Cuda(cudaMemcpy(device.data(), memory, memory_bytes, cudaMemcpyDeviceToHost));
    CHECK(device == wanted);
  }
  Cuda(cudaFree(memory));
}

}  // namespace
}  // namespace kvmem

int main() {
  using kvmem::CopyMethod;
  int n_devices = 0;
  if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
    std::fprintf(stderr, "no GPU here\n");
    return 77;
  }
  int n = 0;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    for (const CopyMethod store : {CopyMethod::kDma, CopyMethod::kDirect, CopyMethod::kStaged}) {
      for (const CopyMethod load : {CopyMethod::kDma, CopyMethod::kDirect, CopyMethod::kStaged}) {
        kvmem::RoundTrip(seed, store, load);
        ++n;
      }
    }
  }
  std::printf("%d round trips\n", n);
}

// The GPU copier's host side without a GPU (fake_cuda.h): for random layouts, lists and methods,
// whatever order the device takes that streams and events allow, bytes, checksums and statuses are
// right, nothing beside them is touched, and any failing call costs its blocks and nothing else.
#include "copy/cuda/gpu_copier.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../arena_bytes.h"
#include "../check.h"
#include "fake_cuda.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

constexpr CopyMethod kAll[] = {CopyMethod::kDma, CopyMethod::kDirect, CopyMethod::kStaged};

// Device memory of a random layout, what each block holds, and an arena for it.
class Rig {
 public:
  Rig(uint64_t seed, bool even) : random(seed) {
    fake_cuda::Reset(seed);
    const size_t n_layers = 1 + random() % 5;
    n_blocks = 2 + random() % 40;
    const uint64_t unit = even ? (random() % 2 == 0 ? 4096 : 1024) : 8;
    uint64_t total = 0;
    std::vector<uint64_t> pieces;
    std::vector<uint64_t> strides;
    for (size_t i = 0; i < n_layers; ++i) {
      pieces.push_back(unit * (1 + random() % (8192 / unit)));
      strides.push_back(pieces.back() + (even ? 64 : 8) * (random() % 3));
      total += strides.back() * n_blocks;
    }
    bytes = std::accumulate(pieces.begin(), pieces.end(), uint64_t{0});
    CHECK(cudaMalloc(reinterpret_cast<void**>(&memory), total) == cudaSuccess);
    memory_bytes = total;
    for (uint64_t i = 0; i < total; ++i) memory[i] = static_cast<std::byte>(random());
    std::byte* base = memory;
    for (size_t i = 0; i < n_layers; ++i) {
      layers.push_back({base, strides[i], pieces[i]});
      base += strides[i] * n_blocks;
    }
    n_slots = 2 + random() % 40;
    arena = std::make_unique<TestArena>(n_slots, bytes + 8 * (random() % 9));
    keys.resize(n_slots * kKeyBytes);
    for (auto& byte : keys) byte = static_cast<std::byte>(random());
  }
  ~Rig() {
    copier.reset();
    CHECK(cudaFree(memory) == cudaSuccess);
  }
  Rig(const Rig&) = delete;
  Rig& operator=(const Rig&) = delete;

  std::unique_ptr<GpuCopier> Make(CopyMethod store, CopyMethod load, std::string* error) {
    auto made =
        GpuCopier::Make(arena->table(), arena->header_bytes(), arena->bytes(), 0, 16, error);
    if (made == nullptr || !made->RegisterLayers(0, layers, n_blocks, error)) return nullptr;
    if (!made->SetMethod(0, CopyWay::kToHost, store)) return nullptr;
    if (!made->SetMethod(0, CopyWay::kToDevice, load)) return nullptr;
    return made;
  }
  void Use(CopyMethod store, CopyMethod load) {
    std::string error;
    copier = Make(store, load, &error);
    CHECK(copier != nullptr);
  }

  std::vector<std::byte> Block(size_t block) const {
    std::vector<std::byte> all;
    for (const Layer& layer : layers) {
      const std::byte* const at = layer.base + block * layer.stride;
      all.insert(all.end(), at, at + layer.piece);
    }
    return all;
  }
  // n different numbers below `below`.
  std::vector<int32_t> Draw(size_t n, size_t below) {
    std::vector<int32_t> all(below);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), random);
    all.resize(n);
    return all;
  }
  CopyRequest Request(const std::vector<int32_t>& blocks, const std::vector<int32_t>& slots,
                      const std::vector<uint64_t>& generations) const {
    return {0, blocks.size(), blocks.data(), slots.data(), generations.data(), keys.data()};
  }

  std::mt19937_64 random;
  size_t n_blocks = 0;
  size_t n_slots = 0;
  uint64_t bytes = 0;
  std::byte* memory = nullptr;
  uint64_t memory_bytes = 0;
  std::vector<Layer> layers;
  std::vector<std::byte> keys;
  std::unique_ptr<TestArena> arena;
  std::unique_ptr<GpuCopier> copier;
};

cudaStream_t engine_stream = nullptr;

// Whether nothing of the copier's is under way; what the engine's stream has is its own.
bool Idle() {
  CHECK(cudaStreamSynchronize(nullptr) == cudaSuccess);
  CHECK(engine_stream == nullptr || cudaStreamSynchronize(engine_stream) == cudaSuccess);
  return fake_cuda::Pending() == 0;
}

// The engine's step, still under way when the copier is called: it writes a block's bytes.
void WriteLater(std::byte* at, std::byte value) {
  static std::byte values[256];
  std::byte* const source = &values[static_cast<size_t>(value)];
  *source = value;
  CHECK(cudaMemcpyAsync(at, source, 1, cudaMemcpyDefault, engine_stream) == cudaSuccess);
}

void RoundTrip(uint64_t seed, CopyMethod store, CopyMethod load, bool even) {
  Rig rig(seed, even);
  rig.Use(store, load);
  const size_t n = 1 + rig.random() % std::min(rig.n_blocks / 2, rig.n_slots);
  const std::vector<int32_t> sources = rig.Draw(n, rig.n_blocks);
  const std::vector<int32_t> slots = rig.Draw(n, rig.n_slots);
  const std::vector<uint64_t> generations(n, 1 + rig.random() % 100);
  const CopyRequest stored = rig.Request(sources, slots, generations);
  // C1: the step that makes the last bytes of the blocks is not over yet.
  std::vector<std::vector<std::byte>> wanted;
  const Layer& last = rig.layers.back();
  for (const int32_t block : sources) {
    wanted.push_back(rig.Block(static_cast<size_t>(block)));
    const auto value = static_cast<std::byte>(rig.random());
    wanted.back().back() = value;
    WriteLater(last.base + static_cast<uint64_t>(block) * last.stride + last.piece - 1, value);
  }
  std::vector<CopyStatus> status(n, CopyStatus::kRange);
  std::vector<uint64_t> checksums(n);
  rig.copier->Store(stored, engine_stream, status.data(), checksums.data());
  const SlotTable table = rig.arena->table();
  for (size_t i = 0; i < n; ++i) {
    CHECK(status[i] == CopyStatus::kOk);
    const std::byte* const slot = table.Data(static_cast<uint64_t>(slots[i]));
    CHECK(std::memcmp(slot, wanted[i].data(), rig.bytes) == 0);
    CHECK(checksums[i] == Xxh3_64(wanted[i].data(), rig.bytes));
    CHECK(table.IsComplete(static_cast<uint64_t>(slots[i]), generations[0]));
  }
  // C2: a step that still writes to a target comes before the load.
  const std::vector<int32_t> targets = rig.Draw(n, rig.n_blocks);
  std::vector<std::byte> after(rig.memory, rig.memory + rig.memory_bytes);
  for (size_t i = 0; i < n; ++i) {
    uint64_t from = 0;
    for (const Layer& layer : rig.layers) {
      std::byte* const at = layer.base + static_cast<uint64_t>(targets[i]) * layer.stride;
      std::memcpy(after.data() + (at - rig.memory), wanted[i].data() + from, layer.piece);
      from += layer.piece;
    }
    WriteLater(rig.layers[0].base + static_cast<uint64_t>(targets[i]) * rig.layers[0].stride,
               std::byte{0xee});
  }
  const size_t damaged = rig.random() % (2 * n);
  std::vector<uint8_t> verify(n, static_cast<uint8_t>(rig.random() % 2));
  if (damaged < n) {
    table.Data(static_cast<uint64_t>(slots[damaged]))[rig.random() % rig.bytes] ^= std::byte{1};
    std::fill(verify.begin(), verify.end(), 1);
  }
  rig.copier->Load(rig.Request(targets, slots, generations), verify.data(), engine_stream,
                   status.data());
  CHECK(Idle());
  for (size_t i = 0; i < n; ++i) {
    CHECK(status[i] == (i == damaged ? CopyStatus::kChecksum : CopyStatus::kOk));
    if (i != damaged) continue;
    for (const Layer& layer : rig.layers) {  // undefined: whatever is there now
      std::byte* const at = layer.base + static_cast<uint64_t>(targets[i]) * layer.stride;
      std::memcpy(after.data() + (at - rig.memory), at, layer.piece);
    }
  }
  CHECK(std::memcmp(rig.memory, after.data(), rig.memory_bytes) == 0);
}

void TestRoundTrips() {
  CHECK(cudaStreamCreateWithPriority(&engine_stream, cudaStreamNonBlocking, 0) == cudaSuccess);
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    for (const CopyMethod store : kAll) {
      for (const CopyMethod load : kAll) RoundTrip(seed, store, load, true);
    }
    RoundTrip(seed, CopyMethod::kDma, CopyMethod::kDma, false);
  }
  CHECK(cudaStreamSynchronize(engine_stream) == cudaSuccess);
}

// Many batches, and of a staged copy many chunks: what is used again is waited for.
void StoreAndLoadAll(CopyMethod method, size_t n_blocks, uint64_t piece) {
  fake_cuda::Reset(11 + n_blocks);
  const size_t n_bytes = 2 * piece * n_blocks;
  std::byte* memory = nullptr;
  CHECK(cudaMalloc(reinterpret_cast<void**>(&memory), n_bytes) == cudaSuccess);
  std::mt19937_64 random(3);
  auto* const words = reinterpret_cast<uint64_t*>(memory);
  for (size_t i = 0; i < n_bytes / 8; ++i) words[i] = random();
  {
    TestArena arena(n_blocks, 2 * piece);
    std::string error;
    const auto copier =
        GpuCopier::Make(arena.table(), arena.header_bytes(), arena.bytes(), 0, 16, &error);
    CHECK(copier != nullptr);
    const std::vector<Layer> layers = {{memory, piece, piece},
                                       {memory + piece * n_blocks, piece, piece}};
    CHECK(copier->RegisterLayers(0, layers, n_blocks, &error));
    CHECK(copier->SetMethod(0, CopyWay::kToHost, method));
    CHECK(copier->SetMethod(0, CopyWay::kToDevice, method));
    std::vector<int32_t> ids(n_blocks);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random);
    const std::vector<int32_t> slots(ids.rbegin(), ids.rend());
    const std::vector<uint64_t> generations(n_blocks, 1);
    const std::vector<std::byte> keys(n_blocks * kKeyBytes);
    const CopyRequest request{0,          n_blocks, ids.data(), slots.data(), generations.data(),
                              keys.data()};
    std::vector<CopyStatus> status(n_blocks);
    std::vector<uint64_t> checksums(n_blocks);
    copier->Store(request, nullptr, status.data(), checksums.data());
    for (const CopyStatus one : status) CHECK(one == CopyStatus::kOk);
    const std::vector<std::byte> before(memory, memory + n_bytes);
    std::memset(memory, 0xab, n_bytes);
    const std::vector<uint8_t> verify(n_blocks, 1);
    copier->Load(request, verify.data(), nullptr, status.data());
    for (const CopyStatus one : status) CHECK(one == CopyStatus::kOk);
    CHECK(std::memcmp(before.data(), memory, n_bytes) == 0);
    CHECK(Idle());
  }
  CHECK(cudaFree(memory) == cudaSuccess);
}

void TestManyBatches() {
  for (const CopyMethod method : kAll) {
    StoreAndLoadAll(method, 3 * Transfer::kBatchItems - 7, 1024);
#ifndef __SANITIZE_THREAD__  // it takes minutes for them, and they have one thread
    StoreAndLoadAll(method, 24, uint64_t{3} << 20);
    StoreAndLoadAll(method, 4, uint64_t{17} << 20);  // a block is more than a chunk usually is
#endif
  }
}

// Stores and loads from two threads at once: one goes on at a time.
void TestTwoThreads() {
  Rig rig(12, true);
  rig.Use(CopyMethod::kStaged, CopyMethod::kDma);
  const size_t n = std::min(rig.n_blocks, rig.n_slots) / 2;
  const std::vector<int32_t> blocks = rig.Draw(2 * n, rig.n_blocks);
  const std::vector<int32_t> slots = rig.Draw(2 * n, rig.n_slots);
  const auto work = [&](size_t first) {
    const std::vector<uint8_t> verify(n, 1);
    std::vector<CopyStatus> status(n);
    std::vector<uint64_t> checksums(n);
    for (uint64_t generation = 1; generation <= 20; ++generation) {
      const std::vector<uint64_t> generations(n, generation);
      const CopyRequest request{
          0, n, blocks.data() + first, slots.data() + first, generations.data(), rig.keys.data()};
      rig.copier->Store(request, nullptr, status.data(), checksums.data());
      for (const CopyStatus one : status) CHECK(one == CopyStatus::kOk);
      rig.copier->Load(request, verify.data(), nullptr, status.data());
      for (const CopyStatus one : status) CHECK(one == CopyStatus::kOk);
    }
  };
  std::thread other(work, n);
  work(0);
  other.join();
  CHECK(rig.copier->error().empty());
}

// S3, S4: whichever call fails, all blocks have an answer, none is called whole that is not,
// nothing is under way, and the next call works.
void TestEveryFailure() {
  for (const CopyMethod method : kAll) {
    bool came = true;
    for (uint64_t call = 1; came; ++call) {
      Rig rig(call, true);
      rig.Use(method, method);
      const size_t n = std::min(rig.n_blocks, rig.n_slots);
      const std::vector<int32_t> blocks = rig.Draw(n, rig.n_blocks);
      const std::vector<int32_t> slots = rig.Draw(n, rig.n_slots);
      std::vector<CopyStatus> status(n);
      std::vector<uint64_t> checksums(n);
      const std::vector<uint8_t> verify(n, 1);
      fake_cuda::FailAt(call);
      std::vector<uint64_t> generations(n, 1);
      rig.copier->Store(rig.Request(blocks, slots, generations), nullptr, status.data(),
                        checksums.data());
      came = fake_cuda::Failed();
      CHECK(Idle());
      CHECK(came == !rig.copier->error().empty());
      for (size_t i = 0; i < n; ++i) {
        CHECK(status[i] == (came ? CopyStatus::kDevice : CopyStatus::kOk));
        CHECK(!came || checksums[i] == 0);
        CHECK(rig.arena->table().IsComplete(static_cast<uint64_t>(slots[i]), 1) == !came);
      }
      fake_cuda::FailAt(0);
      generations.assign(n, 2);
      const CopyRequest again = rig.Request(blocks, slots, generations);
      rig.copier->Store(again, nullptr, status.data(), checksums.data());
      for (const CopyStatus one : status) CHECK(one == CopyStatus::kOk);
      fake_cuda::FailAt(call);
      rig.copier->Load(again, verify.data(), nullptr, status.data());
      CHECK(Idle());
      for (const CopyStatus one : status) {
        CHECK(one == (fake_cuda::Failed() ? CopyStatus::kDevice : CopyStatus::kOk));
      }
      came = came || fake_cuda::Failed();
      fake_cuda::FailAt(0);
      rig.copier->Load(again, verify.data(), nullptr, status.data());
      for (const CopyStatus one : status) CHECK(one == CopyStatus::kOk);
    }
  }
}

// A copier that can't be made leaves nothing behind.
void TestFailuresAtTheStart() {
  for (uint64_t call = 1;; ++call) {
    Rig rig(3, true);
    const size_t before = fake_cuda::LiveObjects();
    fake_cuda::FailAt(call);
    std::string error;
    auto copier = rig.Make(CopyMethod::kDma, CopyMethod::kDma, &error);
    const bool failed = fake_cuda::Failed();
    fake_cuda::FailAt(0);
    CHECK((copier == nullptr) == failed);
    CHECK(failed == (error.find("out of memory") != std::string::npos));
    copier.reset();
    CHECK(fake_cuda::LiveObjects() == before);
    if (!failed) break;
  }
}

void TestWrongRequestsAreRefusedOneByOne() {
  Rig rig(5, true);
  rig.Use(CopyMethod::kStaged, CopyMethod::kStaged);
  const auto n_blocks = static_cast<int32_t>(rig.n_blocks);
  const auto n_slots = static_cast<int32_t>(rig.n_slots);
  const std::vector<int32_t> blocks = {0, -1, n_blocks, 1, 1};
  const std::vector<int32_t> slots = {0, 1, 1, -1, n_slots};
  const std::vector<uint64_t> generations(5, 1);
  rig.keys.resize(5 * kKeyBytes);
  std::vector<CopyStatus> status(5);
  std::vector<uint64_t> checksums(5);
  const CopyRequest request = rig.Request(blocks, slots, generations);
  rig.copier->Store(request, nullptr, status.data(), checksums.data());
  CHECK(status[0] == CopyStatus::kOk);
  for (size_t i = 1; i < 5; ++i) CHECK(status[i] == CopyStatus::kRange && checksums[i] == 0);
  // Another key, another generation: identity and generation as the CPU's copier tells them.
  std::vector<uint8_t> verify = {1};
  const CopyRequest one{0, 1, blocks.data(), slots.data(), generations.data(), rig.keys.data()};
  rig.copier->Load(one, verify.data(), nullptr, status.data());
  CHECK(status[0] == CopyStatus::kOk);
  rig.keys[0] ^= std::byte{1};
  rig.copier->Load(one, verify.data(), nullptr, status.data());
  CHECK(status[0] == CopyStatus::kIdentity);
  const uint64_t later = 2;
  const CopyRequest moved{0, 1, blocks.data(), slots.data(), &later, rig.keys.data()};
  rig.copier->Load(moved, verify.data(), nullptr, status.data());
  CHECK(status[0] == CopyStatus::kGeneration);
  rig.copier->Store(one, nullptr, status.data(), checksums.data());  // passed, and another block
  CHECK(status[0] == CopyStatus::kGeneration);
}

void TestLayersMustBeOnTheDevice() {
  Rig rig(9, true);
  std::string error;
  auto copier = GpuCopier::Make(rig.arena->table(), rig.arena->header_bytes(), rig.arena->bytes(),
                                0, 16, &error);
  CHECK(copier != nullptr);
  std::vector<std::byte> host(1 << 16);
  CHECK(!copier->RegisterLayers(0, {{host.data(), 1024, 1024}}, 8, &error));
  CHECK(error.find("not on CUDA device 0") != std::string::npos);
  CHECK(!copier->registered(0));
  // The last block ends beyond the memory.
  const uint64_t too_many = rig.memory_bytes / rig.layers[0].stride + 8;
  CHECK(!copier->RegisterLayers(0, {rig.layers[0]}, too_many, &error));
}

void TestUnevenLayoutsTakeOnlyDma() {
  Rig rig(4, false);
  std::string error;
  CHECK(rig.Make(CopyMethod::kStaged, CopyMethod::kDma, &error) == nullptr);
  CHECK(rig.Make(CopyMethod::kDma, CopyMethod::kDirect, &error) == nullptr);
}

void TestMeasuringSetsMethods() {
  Rig rig(6, true);
  rig.Use(CopyMethod::kDma, CopyMethod::kDma);
  double seconds[2][3];
  CHECK(rig.copier->Measure(0, seconds));
  for (const auto& way : seconds) {
    for (const double one : way) CHECK(one > 0);
  }
  const size_t before = fake_cuda::LiveObjects();
  fake_cuda::FailAt(9);
  CHECK(!rig.copier->Measure(0, seconds));
  CHECK(!rig.copier->error().empty());
  CHECK(fake_cuda::LiveObjects() == before);
}

void TestRunsAreJoined() {
  std::vector<CopyRun> runs;
  std::byte device[64];
  std::byte host[64];
  AppendRun({device, host, 8}, &runs);
  AppendRun({device + 8, host + 8, 8}, &runs);    // goes on on both sides
  AppendRun({device + 16, host + 32, 8}, &runs);  // on the device alone
  AppendRun({device + 40, host + 40, 8}, &runs);  // on the host alone
  CHECK(runs.size() == 3 && runs[0].bytes == 16 && runs[1].bytes == 8 && runs[2].bytes == 8);
}

}  // namespace
}  // namespace kvmem

int main() {
  using namespace kvmem;
  TestRunsAreJoined();
  TestRoundTrips();
  TestManyBatches();
  TestTwoThreads();
  TestEveryFailure();
  TestFailuresAtTheStart();
  TestWrongRequestsAreRefusedOneByOne();
  TestLayersMustBeOnTheDevice();
  TestUnevenLayoutsTakeOnlyDma();
  TestMeasuringSetsMethods();
}

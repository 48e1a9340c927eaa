#include "fake_cuda.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "../check.h"
#include "copy/cuda/kernels.h"
#include "hash/xxh3_stream.h"

namespace {

struct FakeEvent {
  uint64_t recorded = 0;  // how often it was
  uint64_t passed = 0;
};

struct Operation {
  std::function<bool()> ready;  // may it run now
  std::function<void()> run;
};

struct FakeStream {
  std::deque<Operation> queue;
};

struct World {
  std::mt19937_64 random{0};
  std::set<FakeStream*> streams;
  std::set<FakeEvent*> events;
  std::map<std::byte*, size_t> memory;  // of the device
  std::set<void*> pinned;
  FakeStream legacy;
  uint64_t calls_until_failure = 0;
  bool failed = false;
};
World& TheWorld() {
  static World world;
  return world;
}

// An allocation or an enqueuing: where a failure may be asked for.
bool FailsNow() {
  World& world = TheWorld();
  if (world.calls_until_failure == 0 || --world.calls_until_failure > 0) return false;
  world.failed = true;
  return true;
}

FakeStream* StreamOf(cudaStream_t stream) {
  if (stream == nullptr) return &TheWorld().legacy;
  auto* const its = reinterpret_cast<FakeStream*>(stream);
  CHECK(TheWorld().streams.count(its) == 1);
  return its;
}

FakeEvent* EventOf(cudaEvent_t event) {
  auto* const its = reinterpret_cast<FakeEvent*>(event);
  CHECK(TheWorld().events.count(its) == 1);
  return its;
}

void Push(cudaStream_t stream, std::function<void()> run, std::function<bool()> ready = {}) {
  StreamOf(stream)->queue.push_back({std::move(ready), std::move(run)});
}

// Runs operations in a drawn order until `done`.
template <class Done>
void RunUntil(Done done) {
  World& world = TheWorld();
  while (!done()) {
    std::vector<FakeStream*> able;
    const auto look = [&](FakeStream* stream) {
      if (stream->queue.empty()) return;
      const Operation& first = stream->queue.front();
      if (!first.ready || first.ready()) able.push_back(stream);
    };
    look(&world.legacy);
    for (FakeStream* stream : world.streams) look(stream);
    CHECK(!able.empty());  // it would wait for ever
    FakeStream* const drawn = able[world.random() % able.size()];
    const Operation operation = std::move(drawn->queue.front());
    drawn->queue.pop_front();
    operation.run();
  }
}

}  // namespace

namespace kvmem::fake_cuda {

void Reset(uint64_t seed) {
  CHECK(Pending() == 0);
  TheWorld().random.seed(seed);
  TheWorld().calls_until_failure = 0;
  TheWorld().failed = false;
}
void FailAt(uint64_t call) {
  TheWorld().calls_until_failure = call;
  TheWorld().failed = false;
}
bool Failed() { return TheWorld().failed; }
size_t Pending() {
  size_t n = TheWorld().legacy.queue.size();
  for (FakeStream* stream : TheWorld().streams) n += stream->queue.size();
  return n;
}
size_t LiveObjects() {
  const World& world = TheWorld();
  return world.streams.size() + world.events.size() + world.memory.size() + world.pinned.size();
}

}  // namespace kvmem::fake_cuda

// ---- the runtime's functions that the copier calls ----------------------------------------------

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "a failure that was asked for";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0;
  *highest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  CHECK(flags == cudaStreamNonBlocking);  // else it would wait for the engine's default stream
  auto made = std::make_unique<FakeStream>();
  TheWorld().streams.insert(made.get());
  *stream = reinterpret_cast<cudaStream_t>(made.release());
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  FakeStream* const its = StreamOf(stream);
  CHECK(its->queue.empty());
  TheWorld().streams.erase(its);
  delete its;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  auto made = std::make_unique<FakeEvent>();
  TheWorld().events.insert(made.get());
  *event = reinterpret_cast<cudaEvent_t>(made.release());
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  FakeEvent* const its = EventOf(event);
  TheWorld().events.erase(its);
  delete its;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** bytes, size_t n) {
  if (FailsNow()) return cudaErrorMemoryAllocation;
  auto* const made = static_cast<std::byte*>(std::aligned_alloc(256, (n + 255) / 256 * 256));
  TheWorld().memory[made] = n;
  *bytes = made;
  return cudaSuccess;
}
cudaError_t cudaFree(void* bytes) {
  RunUntil([] { return kvmem::fake_cuda::Pending() == 0; });  // as the real one waits
  CHECK(TheWorld().memory.erase(static_cast<std::byte*>(bytes)) == 1);
  std::free(bytes);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** bytes, size_t n, unsigned) {
  if (FailsNow()) return cudaErrorMemoryAllocation;
  *bytes = std::aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  TheWorld().pinned.insert(*bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* bytes) {
  CHECK(TheWorld().pinned.erase(bytes) == 1);
  std::free(bytes);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* bytes, size_t, unsigned flags) {
  CHECK((flags & cudaHostRegisterPortable) != 0);
  if (FailsNow()) return cudaErrorMemoryAllocation;
  return TheWorld().pinned.insert(bytes).second ? cudaSuccess
                                                : cudaErrorHostMemoryAlreadyRegistered;
}
cudaError_t cudaHostUnregister(void* bytes) {
  CHECK(TheWorld().pinned.erase(bytes) == 1);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  *attributes = {};
  for (const auto& [base, n] : TheWorld().memory) {
    if (address >= base && address < base + n) attributes->type = cudaMemoryTypeDevice;
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  std::memcpy(to, from, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (FailsNow()) return cudaErrorUnknown;
  Push(stream, [=] { std::memcpy(to, from, n); });
  return cudaSuccess;
}
// Of a batch each copy is by itself, and they have no order.
cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const size_t* bytes,
                                 size_t count, cudaMemcpyAttributes* attributes, size_t* starts,
                                 size_t n_attributes, cudaStream_t stream) {
  CHECK(n_attributes == 1 && starts[0] == 0 && stream != nullptr);
  CHECK(attributes->srcAccessOrder == cudaMemcpySrcAccessOrderStream);  // C1
  if (FailsNow()) return cudaErrorUnknown;
  std::vector<std::function<void()>> copies;
  for (size_t i = 0; i < count; ++i) {
    copies.push_back([a = to[i], b = from[i], n = bytes[i]] { std::memcpy(a, b, n); });
  }
  std::shuffle(copies.begin(), copies.end(), TheWorld().random);
  for (auto& copy : copies) Push(stream, std::move(copy));
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (FailsNow()) return cudaErrorUnknown;
  FakeEvent* const its = EventOf(event);
  const uint64_t version = ++its->recorded;
  Push(stream, [its, version] { its->passed = std::max(its->passed, version); });
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (FailsNow()) return cudaErrorUnknown;
  FakeEvent* const its = EventOf(event);
  Push(stream, [] {}, [its, version = its->recorded] { return its->passed >= version; });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (FailsNow()) return cudaErrorUnknown;
  FakeEvent* const its = EventOf(event);
  RunUntil([&] { return its->passed >= its->recorded; });
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  FakeStream* const its = StreamOf(stream);
  RunUntil([&] { return its->queue.empty(); });
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0F + static_cast<float>(TheWorld().random() % 100);
  return cudaSuccess;
}

}  // extern "C"

// ---- the kernels
// ---------------------------------------------------------------------------------

namespace kvmem {

namespace {

// XXH3's sums of one block of 1,024 bytes, one stripe after the other as the specification says.
void AddBlock(const std::byte* bytes, bool very_last, uint64_t* sums) {
  std::fill_n(sums, 8, 0);
  for (size_t stripe = 0; stripe < 16; ++stripe) {
    const size_t offset = very_last && stripe == 15 ? kXxh3ScrambleOffset - 7 : 8 * stripe;
    for (size_t i = 0; i < 8; ++i) {
      uint64_t word;
      uint64_t secret;
      std::memcpy(&word, bytes + stripe * kXxh3Stripe + 8 * i, 8);
      std::memcpy(&secret, kXxh3Secret + offset + 8 * i, 8);
      const uint64_t keyed = word ^ secret;
      sums[i ^ 1] += word;
      sums[i] += (keyed & 0xffffffffU) * (keyed >> 32);
    }
  }
}

}  // namespace

cudaError_t LaunchMove(Move move, const MoveBatch& batch, unsigned, cudaStream_t stream) {
  if (FailsNow()) return cudaErrorLaunchOutOfResources;
  Push(stream, [move, batch] {
    const uint64_t step_bytes = batch.step_kib * 1024;
    const uint64_t n_chunks = batch.n_steps * batch.step_kib;
    for (uint32_t item = 0; item < batch.n_items; ++item) {
      for (uint32_t s = 0; s < batch.n_steps; ++s) {
        const StepAddress& step = batch.steps[s];
        std::byte* const block =
            step.base + static_cast<uint64_t>(batch.block_ids[item]) * step.stride;
        const uint64_t at =
            batch.row_ids != nullptr ? static_cast<uint64_t>(batch.row_ids[item]) : item;
        std::byte* const row = batch.rows + at * batch.row_stride + s * step_bytes;
        if (move == Move::kGather) std::memcpy(row, block, step_bytes);
        if (move == Move::kScatter) std::memcpy(block, row, step_bytes);
        for (uint64_t kib = 0; batch.sums != nullptr && kib < batch.step_kib; ++kib) {
          const uint64_t chunk = s * batch.step_kib + kib;
          AddBlock(block + kib * 1024, chunk + 1 == n_chunks,
                   batch.sums + (item * n_chunks + chunk) * 8);
        }
      }
    }
  });
  return cudaSuccess;
}

cudaError_t LaunchSumUp(const uint64_t* sums, uint32_t n_items, uint32_t n_chunks,
                        uint64_t* accumulators, cudaStream_t stream) {
  if (FailsNow()) return cudaErrorLaunchOutOfResources;
  Push(stream, [=] {
    for (uint32_t item = 0; item < n_items; ++item) {
      uint64_t* const acc = accumulators + item * 8;
      Xxh3Begin(acc);
      for (uint32_t chunk = 0; chunk < n_chunks; ++chunk) {
        for (size_t i = 0; i < 8; ++i) {
          acc[i] += sums[(static_cast<uint64_t>(item) * n_chunks + chunk) * 8 + i];
          if (chunk + 1 == n_chunks) continue;
          uint64_t secret;
          std::memcpy(&secret, kXxh3Secret + kXxh3ScrambleOffset + 8 * i, 8);
          acc[i] = (acc[i] ^ (acc[i] >> 47) ^ secret) * kXxh3Prime32;
        }
      }
    }
  });
  return cudaSuccess;
}

}  // namespace kvmem

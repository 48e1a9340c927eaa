// What a batch must be is checked before anything of CUDA is called: this runs without a GPU.
#include "../check.h"
#include "copy/cuda/block_copier.h"

namespace kvmem {
namespace {

std::byte memory[4096];
const CudaLayer kLayers[] = {{memory, 128, 100}, {memory + 1024, 100, 100}};

struct Given {
  CudaLayer layers[2] = {kLayers[0], kLayers[1]};
  int32_t block_ids[2] = {0, 7};
  int32_t slot_ids[2] = {3, 0};
  CudaCopyBatch batch = {layers, 2, 8, {memory + 2048, 256, 4}, block_ids, slot_ids, 2};
  // No CUDA call is made with it.
  cudaStream_t stream = reinterpret_cast<cudaStream_t>(memory);

  CudaCopyStatus Enqueue() {
    cudaError_t error = cudaErrorUnknown;
    const CudaCopyStatus status = EnqueueCopy(batch, CudaDirection::kHostToDevice, stream, &error);
    CHECK(error == cudaSuccess);
    return status;
  }
};

template <class Change>
CudaCopyStatus After(Change change) {
  Given given;
  change(given);
  return given.Enqueue();
}

void TestAll() {
  const auto stream = CudaCopyStatus::kBadStream;
  const auto geometry = CudaCopyStatus::kBadGeometry;
  const auto range = CudaCopyStatus::kRange;
  CHECK(After([](Given& g) { g.batch.n = 0; }) == CudaCopyStatus::kOk);
  CHECK(After([](Given& g) { g.stream = nullptr; }) == stream);
  CHECK(After([](Given& g) { g.stream = cudaStreamLegacy; }) == stream);
  CHECK(After([](Given& g) { g.stream = cudaStreamPerThread; }) == stream);
  CHECK(After([](Given& g) { g.batch.n_layers = 0; }) == geometry);
  CHECK(After([](Given& g) { g.batch.slots.base = nullptr; }) == geometry);
  CHECK(After([](Given& g) { g.layers[1].base = nullptr; }) == geometry);
  CHECK(After([](Given& g) { g.layers[1].piece = 0; }) == geometry);
  CHECK(After([](Given& g) { g.layers[0].piece = 129; }) == geometry);
  CHECK(After([](Given& g) { g.batch.slots.stride = 199; }) == geometry);
  CHECK(After([](Given& g) { g.block_ids[1] = 8; }) == range);
  CHECK(After([](Given& g) { g.block_ids[0] = -1; }) == range);
  CHECK(After([](Given& g) { g.slot_ids[0] = 4; }) == range);
  CHECK(After([](Given& g) { g.slot_ids[1] = -1; }) == range);
}

}  // namespace
}  // namespace kvmem

int main() {
  kvmem::TestAll();
  return 0;
}

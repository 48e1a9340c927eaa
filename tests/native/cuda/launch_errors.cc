// What is said of a launch is the launch's own answer: an older error of the engine's is neither
// taken for it nor cleared. Runs without a GPU: the linker puts the two functions below in place of
// the runtime's (--wrap).
#include <utility>

#include "../check.h"
#include "copy/cuda/block_copier.h"

namespace {

cudaError_t older = cudaErrorInvalidDevice;
cudaError_t launch_answers = cudaSuccess;
int n_launches = 0;

}  // namespace

extern "C" cudaError_t __wrap_cudaGetLastError() { return std::exchange(older, cudaSuccess); }
extern "C" cudaError_t __wrap_cudaLaunchKernel(const void*, dim3, dim3, void**, size_t,
                                               cudaStream_t) {
  ++n_launches;
  return launch_answers;
}

int main() {
  using namespace kvmem;
  std::byte memory[4096];
  const CudaLayer layer = {memory, 128, 128};
  const int32_t ids[] = {0, 1};
  const CudaCopyBatch batch = {&layer, 1, 8, {memory + 2048, 128, 8}, ids, ids, 2};
  const auto stream = reinterpret_cast<cudaStream_t>(memory);
  cudaError_t error = cudaErrorUnknown;

  CHECK(EnqueueCopy(batch, CudaDirection::kHostToDevice, stream, &error) == CudaCopyStatus::kOk);
  CHECK(error == cudaSuccess && n_launches == 1);
  CHECK(older == cudaErrorInvalidDevice);

  launch_answers = cudaErrorInvalidConfiguration;
  CHECK(EnqueueCopy(batch, CudaDirection::kHostToDevice, stream, &error) == CudaCopyStatus::kCuda);
  CHECK(error == cudaErrorInvalidConfiguration && n_launches == 2);
  CHECK(older == cudaErrorInvalidDevice);
  return 0;
}

// What is said of a launch is the launch's own answer: an older error of the engine's is neither
// taken for it nor cleared. Runs without a GPU: the linker puts the two functions below in place of
// the runtime's (--wrap).
#include <utility>

#include "../check.h"
#include "copy/cuda/kernels.h"

namespace {

cudaError_t older = cudaErrorInvalidDevice;
cudaError_t launch_answers = cudaSuccess;
int n_launches = 0;
unsigned last_grid = 0;

}  // namespace

extern "C" cudaError_t __wrap_cudaGetLastError() { return std::exchange(older, cudaSuccess); }
extern "C" cudaError_t __wrap_cudaLaunchKernel(const void*, dim3 grid, dim3, void**, size_t,
                                               cudaStream_t) {
  ++n_launches;
  last_grid = grid.x;
  return launch_answers;
}

int main() {
  using namespace kvmem;
  MoveBatch batch = {};
  batch.step_kib = 4;
  uint64_t sums = 0;
  for (const Move move : {Move::kGather, Move::kScatter, Move::kHash}) {
    batch.sums = move == Move::kScatter ? nullptr : &sums;
    launch_answers = cudaSuccess;
    CHECK(LaunchMove(move, batch, 7, nullptr) == cudaSuccess);
    CHECK(last_grid == 7);
    launch_answers = cudaErrorLaunchOutOfResources;
    CHECK(LaunchMove(move, batch, 7, nullptr) == cudaErrorLaunchOutOfResources);
  }
  CHECK(LaunchSumUp(&sums, 9, 3, &sums, nullptr) == cudaErrorLaunchOutOfResources);
  CHECK(last_grid == 2);  // eight threads an item, 64 a thread block
  CHECK(n_launches == 7);
  CHECK(older == cudaErrorInvalidDevice);
}

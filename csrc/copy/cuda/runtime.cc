#include "copy/cuda/runtime.h"

#include <map>
#include <mutex>

namespace kvmem {
namespace {

std::mutex registered_lock;
// How many hold the bytes at an address. Guarded by registered_lock. Never destroyed: copiers may
// outlive static objects.
std::map<void*, int>& Holders() {
  static auto* const holders = new std::map<void*, int>;
  return *holders;
}

}  // namespace

std::string CudaText(const char* call, cudaError_t error) {
  return std::string(call) + ": " + cudaGetErrorString(error);
}

DeviceGuard::DeviceGuard(int device, CudaResult* result) {
  int now = -1;
  if (!result->Ok(cudaGetDevice(&now), "cudaGetDevice") || now == device) return;
  if (result->Ok(cudaSetDevice(device), "cudaSetDevice")) before_ = now;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) static_cast<void>(cudaSetDevice(before_));
}

CudaStream MakeStream(CudaResult* result) {
  if (!result->ok()) return {};
  int lowest = 0;
  int highest = 0;
  cudaStream_t stream = nullptr;
  if (!result->Ok(cudaDeviceGetStreamPriorityRange(&lowest, &highest),
                  "cudaDeviceGetStreamPriorityRange") ||
      !result->Ok(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, lowest),
                  "cudaStreamCreateWithPriority")) {
    return {};
  }
  return CudaStream(stream);
}

CudaEvent MakeEvent(CudaResult* result) {
  if (!result->ok()) return {};
  cudaEvent_t event = nullptr;
  const unsigned flags = cudaEventDisableTiming | cudaEventBlockingSync;
  if (!result->Ok(cudaEventCreateWithFlags(&event, flags), "cudaEventCreate")) return {};
  return CudaEvent(event);
}

DeviceBytes MakeDeviceBytes(size_t n_bytes, CudaResult* result) {
  if (!result->ok()) return {};
  void* bytes = nullptr;
  if (!result->Ok(cudaMalloc(&bytes, n_bytes), "cudaMalloc")) return {};
  return DeviceBytes(bytes);
}

PinnedBytes MakePinnedBytes(size_t n_bytes, CudaResult* result) {
  if (!result->ok()) return {};
  void* bytes = nullptr;
  const unsigned flags = cudaHostAllocPortable | cudaHostAllocMapped;
  if (!result->Ok(cudaHostAlloc(&bytes, n_bytes, flags), "cudaHostAlloc")) return {};
  return PinnedBytes(bytes);
}

std::unique_ptr<HostRegistration> HostRegistration::Of(void* base, size_t n_bytes,
                                                       CudaResult* result) {
  const std::lock_guard guard(registered_lock);
  auto& holders = Holders();
  if (const auto found = holders.find(base); found != holders.end()) {
    ++found->second;
    return std::unique_ptr<HostRegistration>(new HostRegistration(base));
  }
  const unsigned flags = cudaHostRegisterPortable | cudaHostRegisterMapped;
  const cudaError_t error = cudaHostRegister(base, n_bytes, flags);
  if (error == cudaErrorHostMemoryAlreadyRegistered) {
    static_cast<void>(cudaGetLastError());  // an answer, not a failure
    return std::unique_ptr<HostRegistration>(new HostRegistration(nullptr));
  }
  if (!result->Ok(error, "cudaHostRegister")) return nullptr;
  holders[base] = 1;
  return std::unique_ptr<HostRegistration>(new HostRegistration(base));
}

HostRegistration::~HostRegistration() {
  if (base_ == nullptr) return;
  const std::lock_guard guard(registered_lock);
  auto& holders = Holders();
  const auto found = holders.find(base_);
  if (--found->second > 0) return;
  holders.erase(found);
  static_cast<void>(cudaHostUnregister(base_));
}

bool IsOnDevice(const void* address, int device, std::string* error) {
  cudaPointerAttributes attributes = {};
  const cudaError_t told = cudaPointerGetAttributes(&attributes, address);
  if (told != cudaSuccess) {
    *error = CudaText("cudaPointerGetAttributes", told);
    return false;
  }
  if (attributes.type == cudaMemoryTypeDevice && attributes.device == device) return true;
  *error = "a layer's memory is not on CUDA device " + std::to_string(device);
  return false;
}

}  // namespace kvmem

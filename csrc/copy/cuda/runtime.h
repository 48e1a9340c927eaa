// What the copier owns of the CUDA runtime: streams, events, memory, a registered arena. Each is
// made once and given back when it is destroyed; nothing here throws.
//
// Thread safety: each object is one thread's at a time; HostRegistration may be used by many.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

namespace kvmem {

// "cudaMemcpyAsync: an illegal memory access was encountered".
std::string CudaText(const char* call, cudaError_t error);

// The first failure of a row of calls: later ones tell nothing new.
class CudaResult {
 public:
  // Whether all went well until now.
  bool Ok(cudaError_t error, const char* call) {
    if (error != cudaSuccess && text_.empty()) text_ = CudaText(call, error);
    return text_.empty();
  }
  bool ok() const { return text_.empty(); }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// This thread's current device, put back at the end.
class DeviceGuard {
 public:
  DeviceGuard(int device, CudaResult* result);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;
};

// One handle of the runtime's and the call that gives it back.
template <class T, cudaError_t (*kDestroy)(T)>
class CudaHandle {
 public:
  CudaHandle() = default;
  explicit CudaHandle(T handle) : handle_(handle) {}
  CudaHandle(CudaHandle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  CudaHandle& operator=(CudaHandle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  // At the process's end the runtime may be gone before us; there is nobody to tell.
  ~CudaHandle() {
    if (handle_ != nullptr) static_cast<void>(kDestroy(handle_));
  }
  T get() const { return handle_; }

 private:
  T handle_ = nullptr;
};

using CudaStream = CudaHandle<cudaStream_t, cudaStreamDestroy>;
using CudaEvent = CudaHandle<cudaEvent_t, cudaEventDestroy>;
using DeviceBytes = CudaHandle<void*, cudaFree>;
using PinnedBytes = CudaHandle<void*, cudaFreeHost>;

// Each makes nothing when something has failed before.
//
// A stream of its own that does not wait for the legacy one, at the lowest priority: the model's
// kernels come first.
CudaStream MakeStream(CudaResult* result);
// An event for order, not for time; the host sleeps rather than spins where it waits for it.
CudaEvent MakeEvent(CudaResult* result);
DeviceBytes MakeDeviceBytes(size_t n_bytes, CudaResult* result);
PinnedBytes MakePinnedBytes(size_t n_bytes, CudaResult* result);

// Host memory that the device reads and writes at its own address, until this is destroyed. Several
// may hold the same bytes; the last one lets go. Bytes that somebody else has registered stay so.
class HostRegistration {
 public:
  // Null when they cannot be registered.
  static std::unique_ptr<HostRegistration> Of(void* base, size_t n_bytes, CudaResult* result);
  ~HostRegistration();
  HostRegistration(const HostRegistration&) = delete;
  HostRegistration& operator=(const HostRegistration&) = delete;

 private:
  explicit HostRegistration(void* base) : base_(base) {}

  void* const base_;  // null: somebody else's
};

// Whether `address` is memory of this device; else a sentence in *error.
bool IsOnDevice(const void* address, int device, std::string* error);

}  // namespace kvmem

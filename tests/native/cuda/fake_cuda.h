// A CUDA runtime without a GPU, for the copier's host side: linked in place of the real one.
//
// Device memory is host memory. What is enqueued runs only when the host waits for something, and
// then in an order drawn from a seed: any that streams and events allow. So a missing wait, a
// buffer used again too early or a result read before its event is wrong bytes here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvmem::fake_cuda {

// A new order; nothing fails; REQUIRES: nothing is enqueued.
void Reset(uint64_t seed);
// The call number `call` from now (the first is 1) that enqueues or allocates fails, and once only.
void FailAt(uint64_t call);
// Whether that call came.
bool Failed();
// Operations that are enqueued and have not run.
size_t Pending();
// Bytes of device memory, events and streams that exist now.
size_t LiveObjects();

}  // namespace kvmem::fake_cuda

#include "copy/copy_request.h"

#include <utility>

namespace kvmem {

BlockLayout LayoutOf(std::vector<Layer> layers, uint64_t n_blocks, uint64_t slot_bytes,
                     std::string* error) {
  uint64_t bytes = 0;
  if (layers.empty()) *error = "a block has no layers";
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    uint64_t span;
    const bool overflows =
        __builtin_mul_overflow(n_blocks - 1, layer.stride, &span) ||
        __builtin_add_overflow(span, layer.piece, &span) ||
        __builtin_add_overflow(span, reinterpret_cast<uint64_t>(layer.base), &span) ||
        __builtin_add_overflow(bytes, layer.piece, &bytes);
    if (n_blocks == 0 || n_blocks > INT32_MAX || layer.base == nullptr || layer.piece == 0 ||
        layer.piece > layer.stride || overflows) {
      *error = "layer " + std::to_string(i) + ": " + std::to_string(n_blocks) + " blocks of " +
               std::to_string(layer.piece) + " bytes, " + std::to_string(layer.stride) +
               " apart, are no memory";
      return {};
    }
  }
  if (bytes > slot_bytes) {
    *error = "the layers' pieces make " + std::to_string(bytes) + " bytes, a slot has " +
             std::to_string(slot_bytes);
    return {};
  }
  return {std::move(layers), n_blocks, bytes};
}

bool CopyItem::BeginStore(CopyStatus* status, uint64_t* checksum) const {
  *checksum = 0;
  if (!in_range()) {  // S1
    *status = CopyStatus::kRange;
    return false;
  }
  if (table.Claim(slot(), generation())) return true;
  if (table.IsComplete(slot(), generation()) && table.HasIdentity(slot(), identity())) {
    *checksum = table.Descriptor(slot()).checksum.load(std::memory_order_relaxed);
    *status = CopyStatus::kOk;
  } else {
    *status = CopyStatus::kGeneration;
  }
  return false;
}

void CopyItem::EndStore(uint64_t digest, CopyStatus* status, uint64_t* checksum) const {
  const bool done = table.Complete(slot(), generation(), identity(), digest);
  *status = done ? CopyStatus::kOk : CopyStatus::kGeneration;
  *checksum = done ? digest : 0;
}

bool CopyItem::BeginLoad(CopyStatus* status, uint64_t* recorded) const {
  if (!in_range()) {  // S1
    *status = CopyStatus::kRange;
  } else if (table.Generation(slot()) != generation()) {
    *status = CopyStatus::kGeneration;
  } else if (!table.IsComplete(slot(), generation()) ||
             !table.HasIdentity(slot(), identity())) {  // I1
    *status = CopyStatus::kIdentity;
  } else {
    *recorded = table.Descriptor(slot()).checksum.load(std::memory_order_relaxed);
    return true;
  }
  return false;
}

void CopyItem::EndLoad(CopyStatus* status) const {
  const bool copied = *status == CopyStatus::kOk || *status == CopyStatus::kChecksum;
  if (copied && !table.IsComplete(slot(), generation())) {
    *status = CopyStatus::kGeneration;  // A2: reused underneath
  }
}

}  // namespace kvmem

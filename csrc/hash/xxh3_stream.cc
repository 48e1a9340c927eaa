#include "hash/xxh3_stream.h"

#include <algorithm>
#include <cstring>

#include "hash/xxh3.h"
#include "hash/xxh3_long.h"

namespace kvmem {
namespace {

using internal::Xxh3Consume;

Xxh3Consume Consume() {
  static const Xxh3Consume best = internal::SelectXxh3(Xxh3Path::kAuto);
  return best;
}

}  // namespace

void Xxh3Begin(uint64_t acc[8]) { internal::Xxh3Start(acc); }

uint64_t Xxh3DigestOf(const uint64_t acc[8], uint64_t n_bytes) {
  return internal::Xxh3Finish(acc, n_bytes);
}

Xxh3Stream::Xxh3Stream(uint64_t total_bytes) : total_(total_bytes) { internal::Xxh3Start(acc_); }

void Xxh3Stream::AddBlocks(const unsigned char* blocks, size_t n) {
  Consume()(acc_, {blocks, n, 0, nullptr});
  std::memcpy(last_, blocks + n * kXxh3Block - kXxh3Stripe, kXxh3Stripe);
}

void Xxh3Stream::Update(const void* data, size_t bytes) {
  auto from = static_cast<const unsigned char*>(data);
  while (bytes > 0) {
    // A block is added only when more input follows: the last one stays in pending_.
    const uint64_t before_last = (total_ - 1 - seen_) / kXxh3Block;
    const size_t whole = static_cast<size_t>(std::min<uint64_t>(bytes / kXxh3Block, before_last));
    if (pending_bytes_ == 0 && whole > 0) {
      AddBlocks(from, whole);
      from += whole * kXxh3Block;
      bytes -= whole * kXxh3Block;
      seen_ += whole * kXxh3Block;
      continue;
    }
    const size_t step = std::min(bytes, kXxh3Block - pending_bytes_);
    std::memcpy(pending_ + pending_bytes_, from, step);
    pending_bytes_ += step;
    from += step;
    bytes -= step;
    seen_ += step;
    if (pending_bytes_ == kXxh3Block && seen_ < total_) {
      AddBlocks(pending_, 1);
      pending_bytes_ = 0;
    }
  }
}

void Xxh3Stream::SkipBlocks(size_t blocks) { seen_ += blocks * kXxh3Block; }

uint64_t Xxh3Stream::Digest() const {
  if (total_ <= internal::kXxh3ShortBytes) {
    return Xxh3_64(pending_, static_cast<size_t>(total_));
  }
  unsigned char last[kXxh3Stripe];
  if (pending_bytes_ >= kXxh3Stripe) {
    std::memcpy(last, pending_ + pending_bytes_ - kXxh3Stripe, kXxh3Stripe);
  } else {
    const size_t before = kXxh3Stripe - pending_bytes_;
    std::memcpy(last, last_ + kXxh3Stripe - before, before);
    std::memcpy(last + before, pending_, pending_bytes_);
  }
  alignas(64) uint64_t acc[8];
  std::copy(acc_, acc_ + 8, acc);
  Consume()(acc, {pending_, 0, (pending_bytes_ - 1) / kXxh3Stripe, last});
  return internal::Xxh3Finish(acc, total_);
}

}  // namespace kvmem

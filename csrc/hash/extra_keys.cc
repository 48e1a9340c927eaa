#include "hash/extra_keys.h"

#include <bit>
#include <cstring>
#include <string_view>
#include <unordered_map>

#include "hash/sha256.h"

static_assert(std::endian::native == std::endian::little, "numbers are written as they lie");

namespace kvmem {
namespace {

using Kind = ExtraNode::Kind;

void Append(std::vector<uint8_t>* out, const void* bytes, size_t n) {
  const auto* from = static_cast<const uint8_t*>(bytes);
  out->insert(out->end(), from, from + n);
}

// Pickle protocol 5 as CPython's C pickler writes it (Modules/_pickle.c; PEP 3154 for the frames).
//
// Frames: one is opened by the first byte written while none is open. It is closed where a value
// begins once it holds 64 KiB, around a string of 64 KiB or more (which lies outside frames), and
// at the end. One of fewer than four bytes loses its header.
class PickleWriter {
 public:
  explicit PickleWriter(std::vector<uint8_t>* out) : out_(out) {
    out_->assign({0x80, 5});  // PROTO 5, before any frame
  }

  void Finish() {
    Op('.');
    CloseFrame();
  }

  void None() { Atom('N'); }
  void Bool(bool value) { Atom(value ? 0x88 : 0x89); }

  void Int(int64_t value) {
    Begin();
    uint8_t op[2 + sizeof(value)];
    std::memcpy(op + 1, &value, sizeof(value));
    if (value >= 0 && value <= 0xFF) {
      op[0] = 'K';
      Write(op, 2);
    } else if (value >= 0 && value <= 0xFFFF) {
      op[0] = 'M';
      Write(op, 3);
    } else if (value >= INT32_MIN && value <= INT32_MAX) {
      op[0] = 'J';
      Write(op, 5);
    } else {
      LongInt(value);
    }
  }

  // A string or bytes; `codes` are the opcodes for lengths of one byte and of four.
  void String(std::string_view text, uint8_t code1, uint8_t code4, uint64_t identity) {
    Begin();
    if (Recall(identity)) return;
    uint8_t head[5] = {text.size() <= 0xFF ? code1 : code4};
    const auto length = static_cast<uint32_t>(text.size());
    std::memcpy(head + 1, &length, sizeof(length));
    const bool outside = text.size() >= kFrameTarget;
    if (outside) CloseFrame();
    framing_ = !outside;
    Write(head, text.size() <= 0xFF ? 2 : 5);
    Write(text.data(), text.size());
    framing_ = true;
    Memoize(identity);
  }

  void Text(std::string_view text, uint64_t identity) { String(text, 0x8C, 'X', identity); }
  void Bytes(std::string_view bytes, uint64_t identity) { String(bytes, 'C', 'B', identity); }

  // True where the tuple was written before; then its values must not be written again.
  bool OpenTuple(size_t n, uint64_t identity) {
    Begin();
    if (n != 0 && Recall(identity)) return true;
    if (n > 3) Op('(');
    return false;
  }

  void CloseTuple(size_t n, uint64_t identity) {
    constexpr uint8_t kOps[] = {')', 0x85, 0x86, 0x87};
    Op(n > 3 ? 't' : kOps[n]);
    if (n != 0) Memoize(identity);
  }

 private:
  static constexpr size_t kFrameTarget = 64 * 1024;
  static constexpr size_t kFrameMin = 4;
  static constexpr size_t kFrameHeader = 9;
  static constexpr size_t kNoFrame = SIZE_MAX;

  void Atom(uint8_t op) {
    Begin();
    Op(op);
  }

  void Op(uint8_t op) { Write(&op, 1); }

  // Every value begins here; a frame that is full ends.
  void Begin() {
    if (frame_ != kNoFrame && out_->size() - frame_ - kFrameHeader >= kFrameTarget) CloseFrame();
  }

  void Write(const void* bytes, size_t n) {
    if (framing_ && frame_ == kNoFrame) {
      frame_ = out_->size();
      out_->resize(frame_ + kFrameHeader);
    }
    Append(out_, bytes, n);
  }

  void CloseFrame() {
    if (frame_ == kNoFrame) return;
    const uint64_t n = out_->size() - frame_ - kFrameHeader;
    uint8_t* const head = out_->data() + frame_;
    if (n >= kFrameMin) {
      head[0] = 0x95;
      std::memcpy(head + 1, &n, sizeof(n));
    } else {
      std::memmove(head, head + kFrameHeader, n);
      out_->resize(frame_ + n);
    }
    frame_ = kNoFrame;
  }

  // LONG1: two's complement, as few bytes as keep the sign.
  void LongInt(int64_t value) {
    uint8_t op[2 + sizeof(value)] = {0x8A};
    std::memcpy(op + 2, &value, sizeof(value));
    uint8_t n = sizeof(value);
    const uint8_t sign = value < 0 ? 0xFF : 0x00;
    while (op[1 + n] == sign && (op[n] & 0x80) == (sign & 0x80)) --n;
    op[1] = n;
    Write(op, 2 + static_cast<size_t>(n));
  }

  bool Recall(uint64_t identity) {
    const auto it = identity == 0 ? memo_.end() : memo_.find(identity);
    if (it == memo_.end()) return false;
    uint8_t op[5] = {it->second <= 0xFF ? uint8_t{'h'} : uint8_t{'j'}};
    std::memcpy(op + 1, &it->second, sizeof(it->second));
    Write(op, it->second <= 0xFF ? 2 : 5);
    return true;
  }

  void Memoize(uint64_t identity) {
    Op(0x94);
    if (identity != 0) memo_.emplace(identity, n_memo_);
    ++n_memo_;
  }

  std::vector<uint8_t>* const out_;
  bool framing_ = true;
  size_t frame_ = kNoFrame;  // where the open frame's header is
  uint32_t n_memo_ = 0;
  std::unordered_map<uint64_t, uint32_t> memo_;
};

// CBOR (RFC 8949) in canonical form: the shortest head, definite lengths.
class CborWriter {
 public:
  explicit CborWriter(std::vector<uint8_t>* out) : out_(out) { out_->clear(); }

  void Head(uint8_t major, uint64_t value) {
    const auto type = static_cast<uint8_t>(major << 5);
    if (value < 24) {
      out_->push_back(type | static_cast<uint8_t>(value));
      return;
    }
    const int log2_bytes = value <= 0xFF ? 0 : value <= 0xFFFF ? 1 : value <= 0xFFFFFFFF ? 2 : 3;
    out_->push_back(type | static_cast<uint8_t>(24 + log2_bytes));
    for (int byte = (1 << log2_bytes) - 1; byte >= 0; --byte) {
      out_->push_back(static_cast<uint8_t>(value >> (8 * byte)));
    }
  }

  void Int(int64_t value) {
    if (value >= 0) {
      Head(0, static_cast<uint64_t>(value));
    } else {
      Head(1, ~static_cast<uint64_t>(value));
    }
  }

  void Simple(uint8_t code) { out_->push_back(0xE0 | code); }

  void String(uint8_t major, std::string_view text) {
    Head(major, text.size());
    Append(out_, text.data(), text.size());
  }

 private:
  std::vector<uint8_t>* const out_;
};

constexpr uint8_t kCborBytes = 2;
constexpr uint8_t kCborText = 3;
constexpr uint8_t kCborArray = 4;
constexpr uint8_t kCborFalse = 20;
constexpr uint8_t kCborTrue = 21;
constexpr uint8_t kCborNull = 22;

// The node after `at` and everything in it.
size_t After(const ExtraKeys& extra, size_t at) {
  size_t open = 1;
  for (; open != 0; ++at) {
    --open;
    if (extra[at].kind == Kind::kTuple) open += static_cast<size_t>(extra[at].number);
  }
  return at;
}

size_t PickleNode(const ExtraKeys& extra, size_t at, PickleWriter* out) {
  const ExtraNode& node = extra[at];
  switch (node.kind) {
    case Kind::kNone:
      out->None();
      break;
    case Kind::kFalse:
    case Kind::kTrue:
      out->Bool(node.kind == Kind::kTrue);
      break;
    case Kind::kInt:
      out->Int(node.number);
      break;
    case Kind::kText:
      out->Text(node.bytes, node.identity);
      break;
    case Kind::kBytes:
      out->Bytes(node.bytes, node.identity);
      break;
    case Kind::kTuple: {
      const auto n = static_cast<size_t>(node.number);
      if (out->OpenTuple(n, node.identity)) return After(extra, at);
      size_t next = at + 1;
      for (size_t i = 0; i < n; ++i) next = PickleNode(extra, next, out);
      out->CloseTuple(n, node.identity);
      return next;
    }
  }
  return at + 1;
}

void CborNode(const ExtraNode& node, CborWriter* out) {
  switch (node.kind) {
    case Kind::kNone:
      return out->Simple(kCborNull);
    case Kind::kFalse:
      return out->Simple(kCborFalse);
    case Kind::kTrue:
      return out->Simple(kCborTrue);
    case Kind::kInt:
      return out->Int(node.number);
    case Kind::kText:
      return out->String(kCborText, node.bytes);
    case Kind::kBytes:
      return out->String(kCborBytes, node.bytes);
    case Kind::kTuple:  // its values follow, which is CBOR's own order
      return out->Head(kCborArray, static_cast<uint64_t>(node.number));
  }
}

std::string_view Parent(const BlockView& block) {
  return {reinterpret_cast<const char*>(block.parent), kSha256Bytes};
}

}  // namespace

void EncodePickle(const BlockView& block, std::vector<uint8_t>* out) {
  PickleWriter writer(out);
  writer.OpenTuple(3, 0);
  writer.Bytes(Parent(block), 0);
  writer.OpenTuple(block.n_tokens, 0);
  for (size_t i = 0; i < block.n_tokens; ++i) writer.Int(block.tokens[i]);
  writer.CloseTuple(block.n_tokens, 0);
  PickleNode(block.extra, 0, &writer);
  writer.CloseTuple(3, 0);
  writer.Finish();
}

void EncodeCbor(const BlockView& block, std::vector<uint8_t>* out) {
  CborWriter writer(out);
  writer.Head(kCborArray, 3);
  writer.String(kCborBytes, Parent(block));
  writer.Head(kCborArray, block.n_tokens);
  for (size_t i = 0; i < block.n_tokens; ++i) writer.Int(block.tokens[i]);
  for (const ExtraNode& node : block.extra) CborNode(node, &writer);
}

}  // namespace kvmem

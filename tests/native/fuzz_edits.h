// A fuzzer's bytes as edits of a disk store's two files, so that short inputs reach far into them.
//
// An input is flags and edits of an honest store's two files, up to replacing either whole:
//
//   flags         1 seal the table's header, 2 the records, 4 the slots' headers, after the edits;
//                 24: by which budget it is opened (the same, less, more, less by far);
//                 32: more blocks are stored then, and all that was served is read again
//   0 at n bytes  of the table            4 at    cut the table off
//   1 at n bytes  of the data             5 at    cut the data off
//   2 a b         a record over another   6 page  zeros, of either file
//   3 a b         a unit over another     7 bytes all that is left, over a file from `at` on
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "disk/disk_format.h"

namespace kvmem {

using Bytes = std::vector<unsigned char>;

// Reads an input; at its end all is zeros.
class Input {
 public:
  Input(const uint8_t* bytes, size_t n) : at_(bytes), end_(bytes + n) {}
  bool over() const { return at_ == end_; }
  uint8_t Byte() { return over() ? uint8_t{0} : *at_++; }
  size_t Short() {
    const size_t low = Byte();
    return low | size_t{Byte()} << 8;
  }
  Bytes Some(size_t n) {
    n = std::min(n, static_cast<size_t>(end_ - at_));
    Bytes some(at_, at_ + n);
    at_ += n;
    return some;
  }

 private:
  const uint8_t* at_;
  const uint8_t* const end_;
};

inline void Put(Bytes* file, size_t at, const Bytes& some) {
  if (file->size() < at + some.size()) file->resize(at + some.size());
  std::copy(some.begin(), some.end(), file->begin() + static_cast<std::ptrdiff_t>(at));
}

inline void CopyWithin(Bytes* file, size_t first, size_t each, size_t from, size_t to) {
  const size_t n = file->size() < first ? 0 : (file->size() - first) / each;
  if (n == 0) return;
  std::memmove(file->data() + first + to % n * each, file->data() + first + from % n * each, each);
}

struct Files {
  Bytes table, data;
};

inline void Edit(Input* input, Files* files) {
  switch (input->Byte() % 8) {
    case 0: {
      const size_t at = input->Short(), n = input->Byte();
      return Put(&files->table, at, input->Some(n));
    }
    case 1: {
      const size_t at = input->Short(), n = input->Byte();
      return Put(&files->data, at, input->Some(n));
    }
    case 2: {
      const size_t from = input->Byte(), to = input->Byte();
      return CopyWithin(&files->table, sizeof(DiskHeader), sizeof(DiskRecord), from, to);
    }
    case 3: {
      const size_t from = input->Byte(), to = input->Byte();
      return CopyWithin(&files->data, 0, kDiskAlign, from, to);
    }
    case 4:
      return files->table.resize(std::min(files->table.size(), input->Short()));
    case 5:
      return files->data.resize(std::min(files->data.size(), input->Short()));
    case 6: {
      const size_t page = input->Byte();
      Bytes* const file = page % 8 == 0 ? &files->table : &files->data;
      const size_t at = std::min(page / 8 * kDiskAlign, file->size());
      const size_t n = std::min(kDiskAlign, file->size() - at);
      std::fill_n(file->begin() + static_cast<std::ptrdiff_t>(at), n, 0);
      return;
    }
    case 7: {
      Bytes* const file = input->Byte() % 2 == 0 ? &files->table : &files->data;
      const size_t at = input->Short();
      file->resize(std::min(file->size(), at));
      return Put(file, at, input->Some(SIZE_MAX));
    }
  }
}

}  // namespace kvmem

// The tokens of one prompt as Python hands them over: list[int], or an int32 array [n], contiguous.
//
// abi3 hides where an int and a list keep their contents, and its functions cost 5 ns an element.
// They have been in the same place since CPython 3.10, so a list is read in place once that has
// been seen at import, on ints and lists whose contents are known (FindListReader); otherwise, and
// for every int that isn't one positive digit of 30 bits, it is read through those functions.
//
// Thread safety: the GIL must be held as long as a Tokens lives.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvmem::bind {

class Tokens final {
 public:
  // Raises TypeError for what is neither. `source` must outlive this. What runs Python code comes
  // before this: a list that shrinks later is an error where it is read.
  explicit Tokens(nanobind::handle source);

  size_t size() const { return n_; }

  // Tokens [from, from + n), in the array's own memory or in `scratch`. Raises TypeError for an
  // element that is no int (a bool isn't one) and ValueError for one outside 0..2^31-1; both name
  // its index; RuntimeError where a list has shrunk. REQUIRES: from + n <= size().
  const int32_t* Read(size_t from, size_t n, std::vector<int32_t>& scratch) const;

  // The same, always in `scratch`: for work without the GIL, when an array's owner may write to it.
  const int32_t* Copy(size_t from, size_t n, std::vector<int32_t>& scratch) const;

 private:
  using Array = nanobind::ndarray<const int32_t, nanobind::ndim<1>, nanobind::c_contig,
                                  nanobind::device::cpu>;

  void ReadList(size_t from, size_t n, int32_t* out) const;
  static void CheckRange(const int32_t* tokens, size_t from, size_t n);

  size_t n_ = 0;
  PyObject* list_ = nullptr;
  Array array_;
};

// Looks whether lists can be read in place; called once, when the module is made.
void FindListReader();

// "in place" or "abi3"; a non-empty `name` switches first. Raises ValueError for another word, and
// for "in place" where FindListReader didn't find it.
const char* ListReader(const char* name);

}  // namespace kvmem::bind

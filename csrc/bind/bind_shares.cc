#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/copy_arrays.h"
#include "copy/slot_shares.h"

namespace kvmem::bind {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;

using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Blocks of an arena's slots, all shares of each; keeps its mapping alive.
class PySlotShares {
 public:
  explicit PySlotShares(Buffer arena) : arena_(std::move(arena)) {
    auto* const base = reinterpret_cast<std::byte*>(arena_.data());
    std::string error;
    for (uint32_t rank = 0, ranks = 1; rank < ranks; ++rank) {
      const std::optional<SlotTable> table = SlotTable::Open(base, arena_.size(), rank, &error);
      if (!table) throw nb::value_error(error.c_str());
      if (rank == 0) std::memcpy(&ranks, base + offsetof(ArenaHeader, ranks), sizeof ranks);
      tables_.push_back(*table);
    }
  }

  nb::tuple Look(int64_t slot, uint64_t generation, uint32_t group, nb::bytes key) {
    RequireSlot(slot, key);
    uint64_t length = 0;
    std::vector<uint64_t> sums(tables_.size());
    const CopyStatus status =
        LookAtShares(tables_, static_cast<uint64_t>(slot), generation, group,
                     reinterpret_cast<const std::byte*>(key.c_str()), &length, sums.data());
    return nb::make_tuple(static_cast<int>(status), length, ToNumpy(std::move(sums)));
  }

  int Put(int64_t slot, uint64_t generation, uint32_t group, nb::bytes key, ConstBytes from,
          Vector<uint64_t> sums) {
    RequireSlot(slot, key);
    Require(sums.size() == tables_.size(), "sums must have one entry per rank");
    Require(from.size() > 0 && from.size() % tables_.size() == 0,
            "the shares of all ranks must be of one length");
    const uint64_t length = from.size() / tables_.size();
    const std::vector<uint64_t> wanted(sums.data(), sums.data() + sums.size());
    const Identity identity = {group, length, reinterpret_cast<const std::byte*>(key.c_str())};
    nb::gil_scoped_release release;
    return static_cast<int>(PutShares(tables_, static_cast<uint64_t>(slot), generation, identity,
                                      reinterpret_cast<const std::byte*>(from.data()),
                                      wanted.data()));
  }

 private:
  void RequireSlot(int64_t slot, const nb::bytes& key) const {
    Require(slot >= 0 && static_cast<uint64_t>(slot) < tables_[0].n_slots(), "no such slot");
    Require(key.size() == kKeyBytes, "a key has 32 bytes");
  }

  Buffer arena_;
  std::vector<SlotTable> tables_;
};

}  // namespace

void RegisterShares(nb::module_& m) {
  nb::class_<PySlotShares>(
      m, "SlotShares",
      "Whole blocks in an arena's slots, all ranks' shares: what they are, and how they get in.\n"
      "Any thread.\n\n"
      "Statuses: 0 ok, 1 the slot holds another block, 2 it has moved on, 3 the bytes are not the\n"
      "ones that the checksums were taken of, 4 too long.")
      .def(nb::init<Buffer>(), "arena"_a.noconvert(),
           "Keeps the buffer alive.\n\nRaises:\n    ValueError: it is no arena.")
      .def("look", &PySlotShares::Look, "slot"_a, "generation"_a, "group"_a, "key"_a,
           nb::sig("def look(self, slot: int, generation: int, group: int, key: bytes) -> "
                   "tuple[int, int, numpy.typing.NDArray[numpy.uint64]]"),
           "What a slot says of a block: status, bytes of a share, XXH3-64 of each share [ranks].\n"
           "Who reads the bytes asks again after it.")
      .def("put", &PySlotShares::Put, "slot"_a, "generation"_a, "group"_a, "key"_a,
           "shares"_a.noconvert(), "sums"_a.noconvert(),
           nb::sig("def put(self, slot: int, generation: int, group: int, key: bytes, "
                   "shares: numpy.typing.NDArray[numpy.uint8], "
                   "sums: numpy.typing.NDArray[numpy.uint64]) -> int"),
           "A block into a slot that `reserve` gave; its status. It is complete there, each share\n"
           "with its sum, or it is not there.");
}

}  // namespace kvmem::bind

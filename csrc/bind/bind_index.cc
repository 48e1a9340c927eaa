// kvmem._core.HostTier.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <vector>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/keys.h"
#include "bind/py_bytes.h"
#include "pool/host_tier.h"

namespace kvmem::bind {
namespace nb = nanobind;
namespace {

template <typename T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void RaiseValue(const std::string& message) { throw nb::value_error(message.c_str()); }

size_t CheckIndex(const char* name, int64_t value, size_t n_keys) {
  if (value < 0 || static_cast<uint64_t>(value) > n_keys) {
    RaiseValue(std::string(name) + " must be within 0.." + std::to_string(n_keys) +
               " (the number of keys), not " + std::to_string(value));
  }
  return static_cast<size_t>(value);
}

void CheckSameSize(size_t n_slots, const char* name, size_t n) {
  if (n != n_slots) {
    RaiseValue(std::string(name) + " has " + std::to_string(n) + " entries, slots has " +
               std::to_string(n_slots));
  }
}

std::unique_ptr<HostTier> Make(int64_t n_slots, const std::string& order, int64_t keep) {
  if (n_slots < 1 || n_slots > static_cast<int64_t>(PrefixIndex::kMaxSlots)) {
    RaiseValue("n_slots must be within 1.." + std::to_string(PrefixIndex::kMaxSlots) + ", not " +
               std::to_string(n_slots));
  }
  if (keep < 0 || keep > n_slots) {
    RaiseValue("keep must be within 0..n_slots, not " + std::to_string(keep));
  }
  std::unique_ptr<HostTier> tier =
      HostTier::Create(static_cast<uint32_t>(n_slots), order, static_cast<uint32_t>(keep));
  if (!tier) {
    std::string names;
    for (const std::string& name : OrderNames()) names += (names.empty() ? "" : ", ") + name;
    RaiseValue("order must be one of " + names + ", not '" + order + "'");
  }
  return tier;
}

size_t Match(const HostTier& tier, nb::handle source, int64_t start) {
  const Keys keys(source);
  const size_t n = tier.Match(keys, CheckIndex("start", start, keys.size()));
  keys.RaiseIfBad();
  return n;
}

nb::tuple Acquire(HostTier& tier, nb::handle source, int64_t start, int64_t limit, bool use) {
  const Keys keys(source);
  if (limit < 0) RaiseValue("limit must not be negative, not " + std::to_string(limit));
  HostTier::Acquired got =
      tier.Acquire(keys, CheckIndex("start", start, keys.size()), static_cast<size_t>(limit), use);
  try {
    keys.RaiseIfBad();
    return nb::make_tuple(got.lease, got.n, ToNumpy(std::move(got.slots)),
                          ToNumpy(std::move(got.generations)));
  } catch (...) {
    tier.Release(got.lease);  // the caller will never see it
    throw;
  }
}

[[noreturn]] void RaiseLease(uint64_t lease) {
  RaiseValue("lease " + std::to_string(lease) + " is unknown: it ended or never was");
}

void Extend(HostTier& tier, uint64_t lease, nb::handle source, int64_t n) {
  const Keys keys(source);
  const LeaseResult result = tier.Extend(lease, keys, CheckIndex("n", n, keys.size()));
  keys.RaiseIfBad();
  if (result == LeaseResult::kUnknownLease) RaiseLease(lease);
  if (result == LeaseResult::kNotBelow) {
    RaiseValue("lease " + std::to_string(lease) + " is on a block that is not among these keys");
  }
}

void Release(HostTier& tier, uint64_t lease) {
  if (!tier.Release(lease)) RaiseLease(lease);
}

const char* NameOf(ReserveResult result) {
  switch (result) {
    case ReserveResult::kOk:
      return "";
    case ReserveResult::kNoParent:
      return "no_parent";
    case ReserveResult::kNoRoom:
      return "no_room";
  }
  return "";
}

nb::tuple Reserve(HostTier& tier, nb::handle source, int64_t start, int64_t stop) {
  const Keys keys(source);
  const size_t to = CheckIndex("stop", stop, keys.size());
  const size_t from = CheckIndex("start", start, to);
  keys.Require(from == 0 ? 0 : from - 1, to);
  HostTier::Reserved got = tier.Reserve(keys, from, to);
  const char* const reason = NameOf(got.result);
  const std::vector<int32_t> slots = got.slots;
  const std::vector<uint64_t> generations = got.generations;
  try {
    return nb::make_tuple(ToNumpy(std::move(got.index)), ToNumpy(std::move(got.slots)),
                          ToNumpy(std::move(got.generations)), reason);
  } catch (...) {
    tier.Abandon(slots.data(), generations.data(), slots.size());
    throw;
  }
}

nb::tuple List(const HostTier& tier, int64_t first, int64_t n) {
  if (first < 0 || n < 0 || first > UINT32_MAX || n > UINT32_MAX) {
    throw nb::value_error("first and n must be 0 to 2**32 - 1");
  }
  HostTier::Listed listed = tier.List(static_cast<uint32_t>(first), static_cast<uint32_t>(n));
  return nb::make_tuple(ToNumpy(std::move(listed.slots)), ToNumpy(std::move(listed.generations)),
                        ToNumpy(std::move(listed.keys)));
}

nb::tuple Kept(const HostTier& tier) {
  HostTier::Listed kept = tier.Kept();
  return nb::make_tuple(ToNumpy(std::move(kept.slots)), ToNumpy(std::move(kept.generations)));
}

nb::object Find(const HostTier& tier, const nb::bytes& key) {
  if (key.size() != kKeyBytes) throw nb::value_error("key must have 32 bytes");
  const auto found = tier.Find(LoadKey(reinterpret_cast<const unsigned char*>(key.c_str())));
  return found ? nb::object(nb::make_tuple(found->first, found->second)) : nb::none();
}

nb::object Evict(HostTier& tier, int64_t n) {
  if (n < 0) throw nb::value_error("n must not be negative");
  return ToNumpy(tier.Evict(static_cast<size_t>(n)));
}

nb::tuple Cut(HostTier& tier, nb::handle source, int64_t n) {
  const Keys keys(source);
  if (n < 0) RaiseValue("n must not be negative, not " + std::to_string(n));
  HostTier::Tail tail = tier.Cut(keys, static_cast<size_t>(n));
  keys.RaiseIfBad();
  return nb::make_tuple(tail.present, ToNumpy(std::move(tail.slots)));
}

nb::object TakeEvicted(HostTier& tier) {
  const std::vector<unsigned char> keys = tier.TakeEvicted();
  return NewBytes(keys.data(), keys.size());
}

size_t Publish(HostTier& tier, Vector<int32_t> slots, Vector<uint64_t> generations,
               Vector<uint64_t> checksums) {
  CheckSameSize(slots.size(), "generations", generations.size());
  CheckSameSize(slots.size(), "checksums", checksums.size());
  return tier.Publish(slots.data(), generations.data(), checksums.data(), slots.size());
}

nb::object Restore(HostTier& tier, Vector<int32_t> slots, Vector<uint64_t> generations,
                   Vector<uint64_t> checksums, Vector<uint8_t> keys, Vector<uint8_t> parents) {
  const size_t n = slots.size();
  CheckSameSize(n, "generations", generations.size());
  CheckSameSize(n, "checksums", checksums.size());
  CheckSameSize(n * kKeyBytes, "keys", keys.size());
  CheckSameSize(n * kKeyBytes, "parents", parents.size());
  HostTier::Recovered blocks;
  blocks.n = n;
  blocks.slots = slots.data();
  blocks.generations = generations.data();
  blocks.checksums = checksums.data();
  blocks.keys = keys.data();
  blocks.parents = parents.data();
  const std::vector<size_t> gone = tier.Restore(blocks);
  return ToNumpy(std::vector<int64_t>(gone.begin(), gone.end()));
}

size_t Abandon(HostTier& tier, Vector<int32_t> slots, Vector<uint64_t> generations) {
  CheckSameSize(slots.size(), "generations", generations.size());
  return tier.Abandon(slots.data(), generations.data(), slots.size());
}

std::string Why(const HostTier& tier, nb::bytes key) {
  if (key.size() != kKeyBytes) {
    RaiseValue("key must have 32 bytes, not " + std::to_string(key.size()));
  }
  switch (tier.Why(LoadKey(key.c_str()))) {
    case Fate::kUnknown:
      return "unknown";
    case Fate::kPending:
      return "pending";
    case Fate::kPublished:
      return "published";
    case Fate::kEvicted:
      return "evicted";
    case Fate::kQuarantined:
      return "quarantined";
    case Fate::kCleared:
      return "cleared";
    case Fate::kAbandoned:
      return "abandoned";
  }
  return "unknown";
}

uint64_t Checksum(const HostTier& tier, int32_t slot, uint64_t generation) {
  const std::optional<uint64_t> checksum = tier.Checksum(slot, generation);
  if (!checksum) {
    RaiseValue("slot " + std::to_string(slot) + " holds no published block of generation " +
               std::to_string(generation));
  }
  return *checksum;
}

nb::dict StatsOf(const HostTier& tier) {
  const HostTier::Stats stats = tier.GetStats();
  nb::dict out;
  out["n_slots"] = stats.n_slots;
  out["free"] = stats.free;
  out["pending"] = stats.pending;
  out["published"] = stats.published;
  out["orphaned"] = stats.orphaned;
  out["condemned"] = stats.condemned;
  out["kept"] = stats.kept;
  out["leases"] = stats.leases;
  out["leased"] = stats.leased;
  out["inserts"] = stats.inserts;
  out["evictions"] = stats.evictions;
  out["abandoned"] = stats.abandoned;
  out["quarantined"] = stats.quarantined;
  out["cleared"] = stats.cleared;
  out["bytes_per_block"] = stats.index_bytes_per_block;
  out["side_bytes_per_block"] = stats.side_bytes_per_block;
  return out;
}

}  // namespace

#define KEYS "keys: list[bytes] | TokenCursor | bytes | numpy.typing.NDArray[numpy.uint8]"
#define INT32 "numpy.typing.NDArray[numpy.int32]"
#define UINT64 "numpy.typing.NDArray[numpy.uint64]"
#define UINT8 "numpy.typing.NDArray[numpy.uint8]"
#define INT64 "numpy.typing.NDArray[numpy.int64]"

void RegisterIndex(nb::module_& m) {
  using nb::arg;
  m.def("eviction_orders", &OrderNames, "The names HostTier takes as `order`, sorted.");
  nb::class_<HostTier>(
      m, "HostTier",
      "The host tier's slots under one prefix index: which slot holds which "
      "block, who uses it, what leaves first.\n\n"
      "One instance per namespace and KV-cache group. All methods may be "
      "called "
      "from any thread; `match` and `why` take no lock. Keys are 32 bytes "
      "each: "
      "a list of bytes, a TokenCursor, or packed as bytes or a uint8 array. A list's elements "
      "are checked where they are looked at.")
      .def(nb::new_(&Make), arg("n_slots"), arg("order") = "s3fifo", arg("keep") = 0,
           "Room for `n_slots` blocks; `order` is one of "
           "`eviction_orders()`. Up to `keep` blocks that were quarantined stay in their slots "
           "for people to look at, as long as there is other room.\n\n"
           "Raises:\n    ValueError: n_slots or keep out of range, unknown order.")
      .def("match", &Match, arg("keys"), arg("start") = 0,
           nb::sig("def match(self, " KEYS ", start: int = 0) -> int"),
           "Blocks of the longest published prefix of `keys`.\n\n"
           "`keys[:start]` is a hint of what matched before; a stale one costs "
           "time only. Not a "
           "use of the blocks, and no promise beyond the call: `acquire` is "
           "both.")
      .def("acquire", &Acquire, arg("keys"), arg("start"), arg("limit"), nb::kw_only(),
           arg("use") = true,
           nb::sig("def acquire(self, " KEYS ", start: int, limit: int, *, use: bool = True) -> "
                   "tuple[int, int, " INT32 ", " UINT64 "]"),
           "Leases the longest published prefix of `keys[:limit]`.\n\n"
           "Returns (lease, n, slots, generations): n blocks matched, and "
           "where blocks [start, n) "
           "are. The lease holds all n blocks until `release`. It is 0 when n "
           "<= start: then "
           "nothing is leased. Counts as a use of the prefix, unless `use` is False: for a "
           "writer that holds what it stored, and for asking again.")
      .def("extend", &Extend, arg("lease"), arg("keys"), arg("n"),
           nb::sig("def extend(self, lease: int, " KEYS ", n: int) -> None"),
           "Moves a lease to the deepest published block of `keys[:n]`, never "
           "up.\n\n"
           "A lease on a block that was cleared or quarantined stays where it "
           "is.\n\n"
           "Raises:\n    ValueError: unknown lease, or its block is not among "
           "these keys.")
      .def("release", &Release, arg("lease"),
           "Ends a lease.\n\nRaises:\n    ValueError: unknown lease.")
      .def("published", &List, arg("first"), arg("n"),
           nb::sig("def published(self, first: int, n: int) -> tuple[" INT32 ", " UINT64 ", "
                   "numpy.typing.NDArray[numpy.uint8]]"),
           "Published blocks in slots [first, first + n) now: slots, generations, keys [n*32].")
      .def("find", &Find, arg("key"),
           nb::sig("def find(self, key: bytes) -> tuple[int, int] | None"),
           "Slot and generation of the published block with this key.")
      .def("evict", &Evict, arg("n"), nb::sig("def evict(self, n: int) -> " INT32),
           "Evicts up to n blocks, as `reserve` does where it must; whose slots they were.")
      .def("cut", &Cut, arg("keys"), arg("n"),
           nb::sig("def cut(self, " KEYS ", n: int) -> tuple[int, " INT32 "]"),
           "Evicts up to n blocks from the end of a piece of a prompt: of `keys`, blocks one below "
           "the other, the deepest that is here first, and only leaves that nobody leases.\n\n"
           "Returns (present, slots): how many of the keys were here before, and whose slots went.")
      .def("free", &HostTier::NumFree, "Slots that can be reserved without evicting anything.")
      .def("take_evicted", &TakeEvicted, nb::sig("def take_evicted(self) -> bytes"),
           "The keys of blocks evicted since this was asked last, 32 bytes each; of very many the "
           "first 4,096.")
      .def("reserve", &Reserve, arg("keys"), arg("start"), arg("stop"),
           nb::sig("def reserve(self, " KEYS ", start: int, stop: int) -> tuple[" INT32 ", " INT32
                   ", " UINT64 ", str]"),
           "Takes slots for those of blocks [start, stop) that are not here, "
           "evicting if it "
           "must.\n\n"
           "Returns (index, slots, generations, reason): block index[j] goes "
           "to slots[j]. reason "
           "is '' if all have a place, 'no_room' (what came before it is "
           "reserved) or 'no_parent' "
           "(block start-1 is not here). Each slot must end in exactly one "
           "`publish` or "
           "`abandon`, also after `clear` or `quarantine`: until then it is "
           "not used again, since "
           "its writer may still be writing.")
      .def("publish", &Publish, arg("slots").noconvert(), arg("generations").noconvert(),
           arg("checksums").noconvert(),
           nb::sig("def publish(self, slots: " INT32 ", generations: " UINT64 ", checksums: " UINT64
                   ") -> int"),
           "Makes reserved blocks match, in the order given, and says how "
           "many.\n\n"
           "The bytes must be complete. A block that can't be published any "
           "more (cleared, "
           "quarantined, or its parent is not published) gives its slot back.")
      .def("restore", &Restore, arg("slots").noconvert(), arg("generations").noconvert(),
           arg("checksums").noconvert(), arg("keys").noconvert(), arg("parents").noconvert(),
           nb::sig("def restore(self, slots: " INT32 ", generations: " UINT64 ", checksums: " UINT64
                   ", keys: " UINT8 ", parents: " UINT8 ") -> " INT64),
           "Publishes what an earlier run had, in its slots and generations.\n\n"
           "`keys` and `parents` are [n*32]; a parent of zeros is none. Answers the indices of "
           "blocks that could not be: their parent is not among them, or slot or key is another's. "
           "Only before anything was reserved. O(n).\n\n"
           "Raises:\n    ValueError: arrays of different lengths.")
      .def("abandon", &Abandon, arg("slots").noconvert(), arg("generations").noconvert(),
           nb::sig("def abandon(self, slots: " INT32 ", generations: " UINT64 ") -> int"),
           "Gives reserved slots back, and says how many.\n\n"
           "Reserved blocks below them can't be published any more; each still "
           "ends in its own "
           "`publish` or `abandon`.")
      .def("quarantine", &HostTier::Quarantine, arg("slot"), arg("generation"),
           nb::call_guard<nb::gil_scoped_release>(),
           "Takes a block and all below it out of matching for good; says how "
           "many blocks.\n\n"
           "0 if the slot has another owner by now. Leased slots stay until "
           "their leases end. The "
           "same keys may be stored anew. O(n_slots), O(1) for a leaf.")
      .def("kept", &Kept, nb::sig("def kept(self) -> tuple[" INT32 ", " UINT64 "]"),
           "Quarantined blocks whose bytes are still in their slots: slots, generations. Those "
           "that are kept, oldest first, then those that leases hold.")
      .def("clear", &HostTier::Clear, nb::call_guard<nb::gil_scoped_release>(),
           "Takes every block out of matching at one instant; says how many "
           "were published.\n\n"
           "Leased slots stay until their leases end, reserved ones until "
           "their writers report. "
           "O(n_slots).")
      .def("why", &Why, arg("key"),
           "What became of the block: 'published', 'pending', 'evicted', "
           "'quarantined', "
           "'cleared', 'abandoned' or 'unknown'.\n\n"
           "Blocks gone are remembered for about 1.5 * n_slots keys (6 bytes a "
           "slot).")
      .def("checksum", &Checksum, arg("slot"), arg("generation"),
           "The checksum given at `publish`.\n\n"
           "Raises:\n    ValueError: the slot holds no such block.")
      .def("stats", &StatsOf, nb::sig("def stats(self) -> dict[str, int]"),
           "Counts by name. bytes_per_block is the index without the 32-byte "
           "key, all tables and "
           "their empty cells included; side_bytes_per_block is the memory of "
           "blocks gone.")
      .def("check_integrity", &HostTier::CheckIntegrity, nb::call_guard<nb::gil_scoped_release>(),
           "One line for every breach of I2, I3, I4, I7 or a count; empty when "
           "all holds. "
           "O(n_slots).");
}

}  // namespace kvmem::bind

#include "pool/eviction.h"

#include "pool/lru.h"
#include "pool/s3fifo.h"

namespace kvmem {

std::unique_ptr<EvictionOrder> MakeOrder(std::string_view name, const PrefixIndex& index,
                                         SlotLinks* links) {
  if (name == "lru") return std::make_unique<Lru>(index, links);
  if (name == "s3fifo") return std::make_unique<S3Fifo>(index, links);
  return nullptr;
}

const std::vector<std::string>& OrderNames() {
  static const std::vector<std::string> names = {"lru", "s3fifo"};
  return names;
}

}  // namespace kvmem

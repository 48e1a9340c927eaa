// A block's extra keys as Python hands them over: None, or the tuple that vLLM's
// generate_block_hash_extra_keys makes, e.g. (("lora", name, path), ("cache_salt", salt)).
//
// Which strings are one object decides what pickle writes (hash/extra_keys.h), so each value keeps
// its object's identity. Only for a tag ("lora", "mm", "cache_salt", "prompt_embeds") the answer
// does not hang on the caller: in the engine it is an interned constant, so here it is one too,
// however the caller made it.
//
// Thread safety: the GIL must be held.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>

#include "hash/chain.h"
#include "hash/extra_keys.h"

namespace kvmem::bind {

// Makes the tags; call once, at import.
void InitExtraKeys();

// The extra keys of one block, nullopt for None. `where` names them in errors. Raises TypeError for
// what the encodings do not hold, ValueError for what they cannot.
std::optional<ExtraKeys> ParseExtraKeys(nanobind::handle value, const char* where,
                                        ChainScheme scheme);

}  // namespace kvmem::bind

"""One cache: the verbs that join the index, the store and the policy; see `kvmem.cache.cache`."""

from kvmem.cache.cache import Cache, Grant, Part, Reservation
from kvmem.cache.far import Carrier
from kvmem.cache.moves import Mover
from kvmem.cache.sessions import Brought, Who

__all__ = ["Brought", "Cache", "Carrier", "Grant", "Mover", "Part", "Reservation", "Who"]

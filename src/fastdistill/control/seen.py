"""Tells most keys that never came before without asking the disk. Forgets none, but may take a new one for old."""

_PLACES = 1 << 22  # a byte each, for bits cost Python twice as much; of a million keys 11% are taken for old ones


class Seen:
    """A Bloom filter of one hash (Bloom 1970, doi:10.1145/362686.362692)."""

    def __init__(self) -> None:
        self._places = bytearray(_PLACES)

    def __contains__(self, key: str) -> bool:
        return self._places[hash(key) % _PLACES] == 1

    def add(self, key: str) -> bool:
        """Whether it may have come before."""
        place = hash(key) % _PLACES
        before, self._places[place] = self._places[place], 1
        return before == 1

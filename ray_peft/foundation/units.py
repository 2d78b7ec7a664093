"""Units of memory: GiB and MiB everywhere, never GB."""

MIB = 2**20
GIB = 2**30

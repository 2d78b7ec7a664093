"""A real model and a real instruction set from the package index and the standard library: no GPU, no hub."""

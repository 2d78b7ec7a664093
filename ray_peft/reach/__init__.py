"""Which part of a model a method reaches: layers that targets name, layers that share weights, and shares as text."""

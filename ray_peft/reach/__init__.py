"""What of a model a method reaches: the layers that targets name, those that share weights, and shares in words."""

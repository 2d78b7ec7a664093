"""A search space file -> its trials: read the text, put profiles in, expand the grid, draw from distributions."""

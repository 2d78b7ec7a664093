"""One trial, from its place to its row: what it does top to bottom, without Ray and without MLflow."""

"""How large what was trained is on disk, in each dtype it can be saved in."""

BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of the dtypes that `train.save_dtype` takes."""


def saved_bytes(parameters: int, dtype: str) -> int:
    """Bytes of so many parameters, without the file's header of some kilobytes."""
    return parameters * BYTES_PER_PARAMETER[dtype]

"""What every room stands on, and what knows none of them: small files, one idiom each.

- `strict` and `measured`: values that are checked and survive JSON;
- `dotted`: settings by dotted key; `units`; `names`: parts of paths;
- `whole`: files and folders that are whole or absent; `cache`: where prepared data is kept; `locks`; `json_lines`;
- `storage`: a disk that refuses; `masking`: secrets that are not shown; `audience`: who is told what happens;
- `nvml`: memory of the GPUs that are here; `processes` that we started; `quiet`: other libraries' messages.

`base` would be its name, but that word means the untouched model here.
"""

"""Results -> what people read: `files.write_report` for a sweep's folder, `plain` for the console.

Modules, each using only those before it: `flat` (specs as dotted keys), `labels` (what to call a trial), `table`
(the comparison as values), `digits` (numbers as text), `uncertainty` (intervals of differences), `atomic` (files that
are whole or absent), `plain`, `csvfile`, `escape` and `markdown` (the formats), `files` (a sweep's folder).
"""

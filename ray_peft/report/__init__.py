"""Results -> what people read: `files.write_report` for a sweep's folder, `plain` for the console.

Modules, each using only those before it:

- values: `flat` (specs as dotted keys), `labels` (what to call a trial), `table` (the comparison as values), `curves`
  (losses over steps), `dynamics` (the loss at chosen steps), `storage` (bytes by dtype), `uncertainty` (intervals of
  differences to the base), `recommend` (what to take for which budget), `ties` (differences between all rows), `costs`
  (what a row takes), `material` (all of these of one sweep);
- words: `digits` (numbers as text), `document` (a report without a format), `columns`, `facts`, `quality`, `training`,
  `advice` (its sections), `palette` and `plots` (its plots), `thumbnails` and `gallery` (made images), `content` (their
  order);
- formats: `atomic` (files that are whole or absent), `plain`, `csvfile`, `escape` and `markdown`, `stylesheet` and
  `webpage`, `files` (a sweep's folder).
"""

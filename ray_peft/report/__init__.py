"""Results -> what people read: `files.write_report` for a sweep's folder, `plain` for the console.

Modules, each using only those before it:

- values: `flat` (specs as dotted keys), `labels` (what to call a trial), `table` (the comparison as values), `curves`
  (losses over steps), `timeline` (when trials ran), `dynamics` (the loss at chosen steps), `storage` (bytes by dtype),
  `uncertainty` (intervals of differences to the base), `recommend` (what to take for which budget), `choosing` (the
  setting that stands for a method), `ties` (differences between them), `costs` (what a row takes), `material` (all of
  these of one sweep);
- words: `digits` (numbers as text), `document` (a report without a format), `answer` (the answer in five lines),
  `columns`, `facts`, `quality`, `training`, `advice`, `rowwise`, `checked` (its sections), `palette`, `drawing`,
  `plots`, `quality_plots` and `timeline_plot` (its plots), `thumbnails` and `gallery` (made images), `content` (their
  order);
- formats: `plain`, `csvfile`, `escape` and `markdown`, `stylesheet`, `script` and `webpage`, `files` (a sweep's
  folder).
"""

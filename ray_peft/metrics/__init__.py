"""How generated text is scored against references.

Arithmetic lives in `text_scores`, `chrf_scores`, `scripts` and `intervals`, which import in a fraction of a second.
`bleu`, `chrf` and `rouge` wrap it for Hugging Face `evaluate`, which takes about 11 s to import, so nothing is imported
here.
"""

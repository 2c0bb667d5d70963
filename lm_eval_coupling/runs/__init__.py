"""One run: documents with prompts in, rows, results and tables out. Knows no lm-eval."""

"""A run, whoever asks for it: documents in, records, results and tables out. Knows no lm-eval."""

"""Measurement of one batch of prompts: from token ids to records."""

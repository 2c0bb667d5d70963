"""From token ids to stored records; knows no lm-eval."""

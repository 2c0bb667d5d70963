"""Pictures as matplotlib figures, without pyplot, hence without global state."""

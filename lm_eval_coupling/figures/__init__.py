"""Every picture, drawn from measured numbers alone: one function per picture, each returns a matplotlib figure."""

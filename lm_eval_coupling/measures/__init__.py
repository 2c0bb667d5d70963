"""What is measured of a prompt: one measure a file."""

"""What is measured of a prompt. Every file here but ``registry`` is one measure; the mathematics is in ``formulas``."""

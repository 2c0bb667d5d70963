"""lm-eval, and what it is told of this package: nothing else here imports it, the command line and the demo excepted."""

"""Image classifiers: accuracy on a labeled data set and coupling of some of its images, in one run.

A run leaves the files that an evaluation of lm-eval leaves, for everything that reads saved runs.
"""

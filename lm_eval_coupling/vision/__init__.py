"""Image classifiers: accuracy on a labelled data set and coupling of the measured images, in one run.

What a run leaves is what an evaluation of lm-eval leaves, so that everything that reads saved runs reads it too.
"""

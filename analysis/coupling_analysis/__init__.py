"""From saved records to what a study shows: tidy tables, one number a row, which the scripts in ``analysis/`` draw."""

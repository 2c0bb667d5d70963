"""Does coupling go with the score? From saved runs to a finding in words."""

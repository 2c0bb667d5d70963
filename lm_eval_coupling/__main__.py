"""`python -m lm_eval_coupling`: the command, where its script is not on the path."""

import sys

from lm_eval_coupling.cli import main

if __name__ == "__main__":
    sys.exit(main())

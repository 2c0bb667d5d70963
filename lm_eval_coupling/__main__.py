"""The command as `python -m lm_eval_coupling`, for when its script is not on the path."""

import sys

from lm_eval_coupling.cli import main

if __name__ == "__main__":
    sys.exit(main())

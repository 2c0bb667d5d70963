"""Fresh processes that share the loading of heavy packages: they are forked from one that has it.

Neither lm-eval nor this package is loaded before a program starts, so that the start-up hook and
the search for plugins find what they find in a new interpreter.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LOADED = (
    "torch.distributed.tensor",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "datasets",
    "accelerate",
    "pandas",
    "pyarrow.parquet",
)
SERVER = f"""
import gc, importlib, json, os, runpy, sys
for name in {LOADED!r}:
    importlib.import_module(name)
gc.freeze()  # no collection in a child need look at them
while line := sys.stdin.readline():
    request = json.loads(line)
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for descriptor, file in enumerate((os.devnull, request["stdout"], request["stderr"])):
    os.dup2(os.open(file, os.O_RDWR), descriptor)
os.environ.clear()
os.environ.update(request["environment"])
sys.argv = request["words"]
sys.path[:0] = [os.path.dirname(sys.argv[0]), *os.environ["PYTHONPATH"].split(os.pathsep)]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Read when the packages are loaded, hence the same in every program.
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@functools.cache
def _server(worker: int) -> subprocess.Popen:
    """Start the process from which the others are forked; it ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=os.environ | SETTINGS | {"LM_EVAL_COUPLING_NO_HOOK": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run_forked(words, environment) -> subprocess.CompletedProcess:
    """Run a script with arguments in a process forked for it, and wait for its end.

    Args:
        words: the script's path and its arguments.
        environment: its variables; those of `SETTINGS` count as they are there.
    """
    words = list(map(str, words))
    server = _server(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("stdout", "stderr")}
        request = {"words": words, "environment": environment | SETTINGS}
        for name, file in files.items():
            file.touch()
            request[name] = str(file)
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        texts = {name: file.read_text() for name, file in files.items()}
    return subprocess.CompletedProcess(words, code, **texts)

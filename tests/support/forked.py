"""A stand-in for the Python interpreter that is ready at once, for programs that load torch.

Each program runs in a process of its own, forked from one that has loaded the heavy packages.
Neither lm-eval nor this package is among them, so that the start-up hook and the search for plugins
find what they find in a new interpreter; what these two load is. An installed hook, hash seeds and
settings of the allocator need a real interpreter.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LOADED = (
    "torch.utils.collect_env",
    "torch.distributed.tensor",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.conversion_mapping",
    "transformers.trainer",
    "datasets",
    "accelerate",
    "pandas",
    "pyarrow.parquet",
    "requests",
    "sacrebleu",
    "pytablewriter",
    "scipy.io",
    "sqlite3",
    "transformer_lens.model_bridge.sources",
)
# Read when the packages are loaded, hence the same in every program.
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SERVER = f"""
import fcntl, gc, importlib, json, os, runpy, select, signal, socket, sys, types
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
listener.listen(64)
print("ready", flush=True)
loaded = False
watching = 0  # children, one for each program
while True:
    if sys.stdin in select.select([sys.stdin, listener], [], [])[0]:
        for _ in range(watching):
            os.wait()  # what they took counts as taken by the owner
        sys.exit()
    if not loaded:
        for name in {LOADED!r}:
            importlib.import_module(name)
        # lm-eval describes the machine at every evaluation, for which torch starts eleven programs.
        description = sys.modules["torch.utils.collect_env"].get_pretty_env_info()
        sys.modules["torch.utils.collect_env"].get_pretty_env_info = lambda: description
        # Made when the first model is loaded.
        sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")
        gc.freeze()  # no collection in a program need look at them, nor often at its own
        gc.set_threshold(100_000, 20, 100)
        loaded = True
    client, _ = listener.accept()
    if not os.fork():
        break
    client.close()
    watching += 1
    while watching and os.waitpid(-1, os.WNOHANG) != (0, 0):
        watching -= 1
listener.close()
message, descriptors, *_ = socket.recv_fds(client, 1 << 20, 99)
request = json.loads(message)
if program := os.fork():
    for descriptor in descriptors:  # a lock among them must not outlive the program
        os.close(descriptor)
    ended = os.pidfd_open(program)
    try:
        client.send(str(program).encode())
        if client in select.select([client, ended], [], [])[0]:
            raise BrokenPipeError  # the client was killed
        client.send(str(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])).encode())
    except OSError:
        os.kill(program, signal.SIGKILL)
        os.waitpid(program, 0)
    finally:
        os._exit(0)
client.close()
for place, descriptor in enumerate(descriptors):  # none may lie where another belongs
    descriptors[place] = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 512)
    os.close(descriptor)
for descriptor, number in zip(descriptors, request["descriptors"]):
    os.dup2(descriptor, number)
    os.close(descriptor)
# The server's may be a file, in which streams remember that it can be sought.
kept = dict(encoding=sys.stderr.encoding, errors=sys.stderr.errors, closefd=False)
sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, **kept)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.chdir(request["folder"])
os.environ.clear()
os.environ.update(request["environment"] | {SETTINGS!r})
paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
first, *rest = request["words"]
if first == "-u" or os.environ.get("PYTHONUNBUFFERED"):
    sys.stdout.reconfigure(write_through=True)
if first == "-u":
    first, *rest = rest
if first in ("-c", "-m"):
    what, *rest = rest
    sys.path[:0] = ["" if first == "-c" else os.getcwd(), *paths]
    sys.argv = [first, *rest]
    if first == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(what, vars(main))
else:
    sys.path[:0] = [os.path.dirname(first), *paths]
    sys.argv = [first, *rest]
    runpy.run_path(first, run_name="__main__")
"""
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
request = dict(words=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd())
given = map(int, os.listdir("/proc/self/fd"))
request["descriptors"] = [n for n in given if n < 3 or os.path.exists(f"/proc/self/fd/{{n}}")
    and os.get_inheritable(n)]
socket.send_fds(server, [json.dumps(request).encode()], request["descriptors"])
program = int(server.recv(99))
for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, frame: os.kill(program, number))
code = int(server.recv(99))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


VARIABLE = "FORKED_PYTHON"  # path of the client, for all processes that this one starts


def _start() -> str:
    """Start the process from which programs are forked; it ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    client, address = folder / "python", str(folder / "socket")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, address],
        env=os.environ | SETTINGS | {"LM_EVAL_COUPLING_NO_HOOK": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    if server.stdout.readline() != "ready\n":
        raise RuntimeError("the process from which programs are forked has ended; see its error")
    atexit.register(_end, server, folder, os.getpid())
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    return str(client)


def _end(server: subprocess.Popen, folder: Path, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of it ends
    server.stdin.close()
    server.wait()
    shutil.rmtree(folder)


def forked_python() -> str:
    """Return the path of the stand-in for `sys.executable`.

    It takes a script, ``-m module`` or ``-c code``, arguments after it, and ``-u`` before it. The
    working directory, the environment (except for `SETTINGS`), the standard streams, signals and
    the exit code are those of a program that was started directly; its process group is not.
    """
    if os.name != "posix" or not hasattr(os, "pidfd_open"):
        return sys.executable
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = _start()
    return os.environ[VARIABLE]

"""A stand-in for the Python interpreter that is ready at once, for programs that load torch.

Each program runs in a process of its own, forked from one that has loaded the heavy packages.
Neither lm-eval nor this package is among them, so that the start-up hook and the search for plugins
find what they find in a new interpreter. An installed hook, hash seeds and settings of the
allocator need a real one.
"""

import atexit
import functools
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
# Read when the packages are loaded, hence the same in every program.
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SERVER = f"""
import fcntl, gc, importlib, json, os, runpy, select, signal, socket, sys, types
for name in {LOADED!r}:
    importlib.import_module(name)
gc.freeze()  # no collection in a program need look at them, nor often at its own
gc.set_threshold(100_000, 20, 100)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
listener.listen(64)
print("ready", flush=True)
watching = 0  # children, one for each program
while True:
    if sys.stdin in select.select([sys.stdin, listener], [], [])[0]:
        for _ in range(watching):
            os.wait()  # what they took counts as taken by the owner
        sys.exit()
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


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="forked-")


@functools.cache
def _server(owner: int) -> tuple[subprocess.Popen, str]:
    """Start the process from which programs are forked; it ends with its owner, this process."""
    folder = Path(_folder().name)
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
    atexit.register(_end, server)
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    return server, str(client)


def _end(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait()


def forked_python() -> str:
    """Return the path of the stand-in for `sys.executable`.

    It takes a script, ``-m module`` or ``-c code``, arguments after it, and ``-u`` before it. The
    working directory, the environment (except for `SETTINGS`), the standard streams, signals and
    the exit code are those of a program that was started directly; its process group is not.
    """
    if os.name != "posix" or not hasattr(os, "pidfd_open"):
        return sys.executable
    return _server(os.getpid())[1]

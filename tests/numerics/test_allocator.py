"""Memory that was freed is used again without the system in between, unless the user has set the
allocator up.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from forked import forked_python

FAULTS = """
import ctypes, resource
from lm_eval_coupling.numerics.memory import keep_freed_memory
kept = keep_freed_memory()
libc, size = ctypes.CDLL(None), 24 << 20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        held = [libc.malloc(size) for _ in range(4)]  # together more than glibc keeps by itself
        for block in held:
            ctypes.memset(block, 1, size)
        for block in held:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
use()
print("FAULTS", kept, use())
"""


def faults(python=sys.executable, **environment):
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [python, "-c", FAULTS],
        env={"PYTHONPATH": root} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = done.stdout.split("FAULTS")[1].split()
    return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept():
    kept, count = faults()
    if not kept:
        pytest.skip("another allocator than glibc's")
    assert count < 2000, "a hundredth of the pages, which are touched eight times"


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_what_the_user_has_set_up_stays(environment):
    assert not faults(forked_python(), **environment)[0]

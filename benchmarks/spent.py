"""Run a command, and print the CPU seconds of all of its processes and the largest one's GB.

    python spent.py COMMAND...

Only the standard library is loaded: a child's peak of memory begins at its parent's.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from contextlib import suppress

BECOME_SUBREAPER = 36
"""prctl's option by which orphans are this process's children."""

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(BECOME_SUBREAPER, 1)
    code = subprocess.run(sys.argv[1:], stdout=sys.stderr, check=False).returncode
    with suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6]))
    raise SystemExit(code)

"""Run one task in this process and print the peak of its memory in MB.

python -m benchmarks.peak SECONDS JSON, what a batch takes on the device, and a config's keys
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import workload

if __name__ == "__main__":
    with workload.made_up_device(float(sys.argv[1])):
        workload.run_task(json.loads(sys.argv[2]))
    # Not `getrusage`, whose peak may be that of the process which started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)

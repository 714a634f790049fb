"""Run one task in this process and print the peak of its memory in MB.

python -m benchmarks.peak SECONDS JSON, what a batch takes on the device, and a config's keys
"""

from __future__ import annotations

import json
import resource
import sys

from benchmarks import workload

if __name__ == "__main__":
    with workload.made_up_device(float(sys.argv[1])):
        workload.run_task(json.loads(sys.argv[2]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

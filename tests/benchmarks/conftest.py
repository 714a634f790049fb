from __future__ import annotations

import sys
from pathlib import Path

# Last, so that the installed program is what is tested.
sys.path.append(str(Path(__file__).parents[2]))

"""Open the outputs as their users do, and show a few rows.

python scripts/show_demo.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

SHOWN = ("key", "caption", "image-brightness", "image-sharpness", "image-entropy", "text-words")


def main(folder: Path) -> None:
    console = Console(width=110)
    rows = pa.concat_tables(pq.read_table(p) for p in sorted(folder.glob("*.parquet")))
    table = Table(title=f"the first of {rows.num_rows} rows", title_justify="left")
    for name in SHOWN:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for row in rows.slice(0, 6).to_pylist():
        values = (row[name] for name in SHOWN)
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)
    with np.load(folder / "00000.npz") as features:
        shapes = ", ".join(f"{k} {features[k].shape} {features[k].dtype}" for k in features.files)
    console.print(f"features in {folder / '00000.npz'}: {shapes}", soft_wrap=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

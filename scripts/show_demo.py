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

SHOWN = {
    "caption": "caption",
    "language-lid176-language": "language",
    "writing-area": "writing",
    "opennsfw-score": "NSFW",
    "image-brightness": "brightness",
    "image-sharpness": "sharpness",
    "text-words": "words",
}
"""Columns, and how they are headed."""
PARTS = 4
"""Rows of one picture: the whole of it, and parts."""


def main(folder: Path) -> None:
    console = Console(width=112)
    rows = pa.concat_tables(pq.read_table(p) for p in sorted(folder.glob("*.parquet")))
    named = [np.load(p) for p in sorted(folder.glob("*.npz"))]
    sentences = np.concatenate([features["sentence-feature"] for features in named])
    console.print(shown(rows))
    console.print(alike(rows["caption"].to_pylist(), sentences.astype(np.float32)))
    shapes = ", ".join(f"{k} {named[0][k].shape} {named[0][k].dtype}" for k in named[0].files)
    console.print(f"features in {folder / '00000.npz'}: {shapes}", soft_wrap=True)


def shown(rows: pa.Table) -> Table:
    """A row a picture: a part of it where that has a caption in another language, or the whole."""
    table = Table(title=f"{rows.num_rows // PARTS} of {rows.num_rows} rows", title_justify="left")
    for name, head in SHOWN.items():
        is_text = name == "caption"
        table.add_column(head, no_wrap=True, justify="left" if is_text else "right")
    parts = rows.to_pylist()
    for whole, last in zip(parts[::PARTS], parts[PARTS - 1 :: PARTS], strict=True):
        row = whole if last["caption"].startswith(whole["caption"]) else last
        values = (row[name] for name in SHOWN)
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    return table


def alike(captions: list[str], sentences: np.ndarray) -> str:
    """The two pictures whose captions mean most nearly the same, by their embeddings."""
    cosines = sentences[::PARTS] @ sentences[::PARTS].T
    np.fill_diagonal(cosines, -1)
    a, b = np.unravel_index(cosines.argmax(), cosines.shape)
    one, other = captions[a * PARTS], captions[b * PARTS]
    return f"nearest captions of two pictures: {one!r} and {other!r}, cosine {cosines.max():.2f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The page of `d2m report` in a real browser, wide and narrow, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from d2m_hpc.watch import page as report
from d2m_hpc.watch.status import find_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian's package)")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--allow-file-access-from-files", "--enable-logging=stderr"),
    *("--virtual-time-budget=10000", "--dump-dom"),
]
SCHEMES = {"light": "1", "dark": "0"}
WIDTHS = (1200, 400)
PROBE = """\
<!DOCTYPE html>
<body>%s<pre id="told"></pre>
<script>
const visible = e => e.getClientRects().length > 0;
const look = frame => {
  const page = frame.contentDocument, root = page.documentElement;
  const inside = e => e.closest(".scroll") === null && e.closest("svg") === null;
  const boxes = [...page.querySelectorAll("body *")].filter(inside).filter(visible);
  const out = boxes.filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > root.clientWidth + 1 || box.left < -1;
  });
  const labels = [...page.querySelectorAll(".x-axis")].map(axis =>
    [...axis.children].map(e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right]));
  return {
    width: root.clientWidth, scroll: root.scrollWidth, title: page.title,
    out: out.map(e => e.outerHTML.slice(0, 200)),
    overlaps: labels.filter(row => row.some((box, i) => i && box[0] < row[i - 1][1])).length,
    pictures: [...page.images].filter(i => i.naturalWidth > 0).length,
    colours: [page.body, page.querySelector(".soft"), page.querySelector("figcaption")].map(
      e => [frame.contentWindow.getComputedStyle(e).color,
            frame.contentWindow.getComputedStyle(page.body).backgroundColor]),
  };
};
window.onload = () => {
  const told = [...document.querySelectorAll("iframe")].map(look);
  document.getElementById("told").textContent = JSON.stringify(told);
};
</script>
"""


@pytest.fixture(scope="module")
def page(troubled_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "report.html"
    report.write(*find_run(troubled_folder / "out" / ".d2m"), path, None, 8)
    return path


def _browse(page: Path, folder: Path, scheme: str) -> tuple[list[dict[str, Any]], str]:
    """What a script around the page sees of it at each width, and what the browser logged."""
    frames = (f'<iframe src="{page.as_uri()}" width="{w}" height="900"></iframe>' for w in WIDTHS)
    probe = folder / "probe.html"
    probe.write_text(PROBE % "".join(frames))
    own = (
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    ended = subprocess.run(
        [str(CHROMIUM), *FLAGS, *own, probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told = re.search(r'<pre id="told">(.+?)</pre>', ended.stdout, re.DOTALL)
    assert told, ended.stderr
    return json.loads(html.unescape(told[1])), ended.stderr


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_whole_in_a_browser(page: Path, tmp_path: Path, scheme: str) -> None:
    seen, logged = _browse(page, tmp_path, SCHEMES[scheme])
    assert "CONSOLE" not in logged, logged
    for told, width in zip(seen, WIDTHS, strict=True):
        assert told["scroll"] <= told["width"] <= width
        assert (told["out"], told["overlaps"]) == ([], 0)
        assert told["pictures"] == 24
        assert told["title"].startswith("d2m: ")
        assert all(_contrast(*pair) >= 4.5 for pair in told["colours"])
        ground = _luminance(told["colours"][0][1])
        assert ground > 0.9 if scheme == "light" else ground < 0.05


def test_a_page_that_is_not_whole_would_be_found(page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    wide = '<div style="width: 3000px">wide</div><script>document.title = "caught"</script>'
    broken.write_text(page.read_text("utf-8").replace("<h2>Values", f"{wide}<h2>Values"), "utf-8")
    seen, logged = _browse(broken, tmp_path, SCHEMES["light"])
    assert re.search("CONSOLE.*script", logged)  # and the page's policy kept it from running
    for told in seen:
        assert told["scroll"] > told["width"]
        assert ["wide" in element for element in told["out"]] == [True]
        assert told["title"].startswith("d2m: ")


def _contrast(ink: str, ground: str) -> float:
    """Between two `rgb(r, g, b)`, 1 to 21 (WCAG 2.2)."""
    high, low = sorted(map(_luminance, (ink, ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(p) / 255 for p in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

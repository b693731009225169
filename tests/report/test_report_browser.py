"""The page in a real browser: the figures draw, in light and dark, and on a phone."""

import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import pytest
from synthetic import ARMS

from zoo.report.charts import COLORS

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium found")

# Goes to the second protocol and leaves in the title what only a browser knows.
PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll("[name=protocol]")[1].click();
  setTimeout(() => {
    const wide = document.documentElement.scrollWidth - innerWidth;
    const pane = document.querySelector("[data-figure=scores-blocks] svg");
    document.title = `overflow ${wide} second ${pane ? pane.clientWidth : 0}`;
  }, 1500);
}, 1500));
</script>"""


# Brings the headline figure to the top, so that a small picture holds all of it.
FIGURE_ONLY = """<style>
header, h2, p, .tabs, .legend { display: none !important }
main { padding: 8px !important }
</style>"""


def with_extra(folder: Path, target: Path, extra: str) -> Path:
    """A copy of the report with something more at its end."""
    before, _, after = (folder / "report.html").read_text().rpartition("</body>")
    (target / "page.html").write_text(f"{before}{extra}</body>{after}")
    return target / "page.html"


def browse(page: Path, profile: Path, *what: str, size: str = "660,520", dark: bool = False) -> str:
    """Open a page in a fresh profile and return what the browser prints."""
    flags = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--hide-scrollbars", "--virtual-time-budget=6000", f"--window-size={size}"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={profile}",
    )
    command = [str(BROWSER), *flags, *what, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout


def colors(png: bytes) -> Counter[tuple[int, int, int]]:
    """How often each colour occurs in an 8-bit PNG without interlacing."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) in ((8, 2), (8, 6))
    parts, at = [], 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        parts += [png[at + 8 : at + 8 + size]] if png[at + 4 : at + 8] == b"IDAT" else []
        at += size + 12
    data, pixel = zlib.decompress(b"".join(parts)), 3 if kind == 2 else 4
    stride = width * pixel
    above, seen = bytearray(stride), Counter()
    for row in range(height):
        start = row * (stride + 1)
        line, how = bytearray(data[start + 1 : start + 1 + stride]), data[start]
        for i in range(stride) if how else ():
            left, corner = (line[i - pixel], above[i - pixel]) if i >= pixel else (0, 0)
            up = above[i]
            if how == 4:  # Paeth: whichever is nearest to left + up - corner
                far = (abs(up - corner), abs(left - corner), abs(left + up - 2 * corner))
                guess = (left, up, corner)[far.index(min(far))]
            else:
                guess = (0, left, up, (left + up) // 2)[how]
            line[i] = (line[i] + guess) & 255
        seen.update(zip(line[::pixel], line[1::pixel], line[2::pixel], strict=True))
        above = line
    return seen


@pytest.mark.parametrize(
    ("dark", "paper", "ink"),
    [(False, (252, 252, 250), (29, 31, 35)), (True, (19, 21, 25), (232, 232, 228))],
    ids=["light", "dark"],
)
def test_the_figure_is_drawn_in_the_colours_of_the_arms(report, tmp_path, dark, paper, ink):
    shot = tmp_path / "page.png"
    figure = with_extra(report[0], tmp_path, FIGURE_ONLY)
    browse(figure, tmp_path / "profile", f"--screenshot={shot}", dark=dark)
    seen = colors(shot.read_bytes())
    assert seen.most_common(1)[0][0] == paper
    assert seen[ink] > 50
    for color in COLORS[: len(ARMS)]:
        rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
        assert seen[rgb] > 100, color


def test_every_figure_draws_and_nothing_overflows_a_phone(report, tmp_path):
    probed = with_extra(report[0], tmp_path, PROBE)
    dom = browse(probed, tmp_path / "profile", "--dump-dom", size="400,900")
    assert "could not be drawn" not in re.sub(r"<script>.*?</script>", "", dom, flags=re.S)
    drawn = re.findall(r'data-figure="([\w-]+)"[^>]*><svg', dom)
    assert drawn
    assert drawn == re.findall(r'id="spec-([\w-]+)"', dom)
    assert dom.count('aria-roledescription="line mark"') >= 9
    overflow, second = re.search(r"overflow (-?\d+) second (\d+)", dom).groups()  # type: ignore
    assert int(overflow) <= 0
    assert int(second) > 250

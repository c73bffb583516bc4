"""The report in a real browser: its text, its console, its layout at three widths, light and dark, and on paper."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
from made_results import made_results, made_study, made_verdicts
from page import Page, chromium, needs_chromium
from PIL import Image

from moe_lab.report.write import report

pytestmark = needs_chromium
WIDTHS = (390, 820, 1400)
# Beside the page, in the same folder: three frames of it, and what a script of ours finds there.
FRAMES = """<!DOCTYPE html><body>%s<pre id="found"></pre><script>
onload = () => {
  const found = {}
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement
    const boxes = [...page.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg, .ticks"))
    found[frame.width] = {
      wide: root.scrollWidth - root.clientWidth,
      out: boxes.filter(e => e.getBoundingClientRect().right > frame.width).map(e => e.outerHTML.slice(0, 80)),
      verdict: page.querySelector(".claims li").getBoundingClientRect().top,
      small: [...page.querySelectorAll(".panel > svg text")].map(e => e.getBoundingClientRect().height).sort()[0],
      pictures: [...page.images].filter(e => e.naturalWidth == 0).length,
      columns: new Set([...page.querySelector(".panels").children].map(e => e.getBoundingClientRect().left)).size,
      table: page.querySelector(".scroll").scrollWidth > page.querySelector(".scroll").clientWidth,
    }
  }
  document.getElementById("found").textContent = JSON.stringify(found)
}
</script>"""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    study = made_study(
        lambda text: f"{text} <script>console.error('ran')</script><img src=x onerror=\"console.error('ran')\">"
    )
    report([made_results(study=study)], [made_verdicts(study)], folder)
    return folder / "report.html"


def test_the_browser_shows_it_and_says_nothing(html: Path) -> None:
    dom, console = chromium(html, "--dump-dom")
    assert console == []
    assert Page(dom).text == Page(html.read_text(encoding="utf-8")).text
    assert "<script>console.error('ran')</script>" in Page(dom).text


def test_the_console_is_heard(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<!DOCTYPE html><script>console.error('ran')</script>")
    (tmp_path / "policy.html").write_text(
        "<!DOCTYPE html><meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><img src='x.png'>"
    )
    assert "ran" in chromium(tmp_path / "bad.html", "--dump-dom")[1][0]
    assert "Content Security Policy" in chromium(tmp_path / "policy.html", "--dump-dom")[1][0]


def test_it_fits_phone_tablet_and_desk(html: Path) -> None:
    frames = "".join(f'<iframe src="{html.name}" width="{width}" height="900"></iframe>' for width in WIDTHS)
    (html.parent / "frames.html").write_text(FRAMES % frames)
    dom, _ = chromium(
        html.parent / "frames.html", "--dump-dom", "--allow-file-access-from-files", "--window-size=2800,1000"
    )
    told = re.search(r'<pre id="found">(.+?)</pre>', dom)
    assert told
    found = {int(width): of for width, of in json.loads(unescape(told[1])).items()}
    assert set(found) == set(WIDTHS)
    for width, of in found.items():
        assert of["wide"] <= 0 and of["out"] == [] and of["pictures"] == 0, (width, of)
        assert of["small"] >= 8, (width, of)  # pixels: letters in figures stay readable
    assert found[390]["verdict"] < 600  # the first verdict is on the phone's first screen
    assert [found[width]["columns"] for width in WIDTHS] == [1, 2, 3]
    assert found[390]["table"]  # which scrolls in its box


@pytest.mark.parametrize("width, dark", [(390, False), (820, True), (1400, False)])
def test_it_is_painted_in_light_and_dark(html: Path, width: int, dark: bool) -> None:
    shot = html.parent / f"{width}.png"
    scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
    _, console = chromium(html, f"--screenshot={shot}", f"--window-size={width},2400", scheme)
    picture = Image.open(shot).convert("RGB")
    assert console == [] and picture.size == (width, 2400)
    colours = picture.getcolors(1 << 24) or []
    count, paper = max(colours)
    assert isinstance(paper, tuple)
    assert (max(paper) < 60) == dark and (min(paper) > 240) != dark
    assert 0.5 < count / (width * 2400) < 0.99 and len(colours) > 100


def test_it_prints(html: Path) -> None:
    pdf = html.parent / "report.pdf"
    _, console = chromium(html, f"--print-to-pdf={pdf}")
    assert console == [] and pdf.read_bytes().startswith(b"%PDF")
    assert 2 <= pdf.read_bytes().count(b"/Type /Page\n") <= 12

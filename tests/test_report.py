"""The report's page, tables and figures, from made-up studies: content, structure, size, and names that are attacks."""

import csv
import dataclasses
import re
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from made_results import ARMS, made_results, made_run, made_study, made_verdicts
from page import Page
from PIL import Image

from moe_lab.report.arms import Arm, interval, section
from moe_lab.report.digest import digest
from moe_lab.report.look import ARMS as ARM_COLOURS
from moe_lab.report.markdown import escape
from moe_lab.report.page import figures, html, part
from moe_lab.report.pixels import rgba
from moe_lab.report.words import number, slug, spread
from moe_lab.report.write import report

FIGURES = ("load", "balance", "loss", "frontier", "router-cosines", "domains", "churn", "expert-loss")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    study = made_study()
    report([made_results(study=study)], [made_verdicts(study)], folder)
    return folder


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_all_files_are_there(out: Path) -> None:
    names = {f"figures/made-{name}.{form}" for name in FIGURES for form in ("svg", "png")}
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"report.html", "report.md", "summary.csv"} | names


def test_figures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "report.md").write_text("![x](figures/gone-load.png)")
    for name in ("gone-load.png", "gone-load.svg", "mine.png"):
        (tmp_path / "figures" / name).touch()
    report([], [], tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["mine.png"]


def test_verdicts_come_first_with_a_sentence_each(page: Page) -> None:
    told = [
        "1 of 13 runs diverged: even seed 3",
        "supported Skewed is skewed",
        "moe/load_cv_of_ceiling (steps: last, layers: mean) of skewed: 0.31 [0.25, 0.37] (98.33 % interval, 3 seeds); "
        "claimed at least 0.1.",
        "refuted Even is cheaper",
        "eval/loss (steps: last) of even minus skewed: 0.2 [0.1, 0.3] (98.33 % interval, 3 seeds); "
        "claimed at most 0. By far.",
        "inconclusive They cost the same",
        "Claimed within 0.01 of equal. Needs seeds.",
        "the claims were edited after its runs began",
        "Load of every expert over training",
    ]
    at = [page.text.index(text) for text in told]
    assert at == sorted(at)


def test_every_figure_says_its_numbers_and_how_to_make_it(page: Page) -> None:
    assert page.text.count("Reproduce this figure") == len(FIGURES)
    for name in FIGURES:
        assert f"figures/made-{name}.svg" in page.text
    fullest = re.search(
        r"Load of the fullest expert of any layer at the end, in fair shares: ([\d.]+) in even", page.text
    )
    assert fullest and 1 <= float(fullest[1]) < 1.5
    drawn = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("aria-hidden") != "true"]
    panels = {"claims with an interval": 2, "balance": 2, "loss": 2, "frontier": 1, "churn": 1, "expert-loss": 1}
    assert len(drawn) == sum(panels.values()) and "No layer of any run has a dead expert" in page.text
    assert all(attrs["role"] == "img" and re.search(r"\d", attrs["aria-label"]) for attrs in drawn)
    pictures = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 3 * 2 * len(ARMS) and all(re.search(r"layer \d.*\d\.\d", alt) for alt in pictures)


def test_headings_are_in_order_and_tables_have_scopes(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[:2] == [1, 2] and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = [href[1:] for tag, attrs in page.tags for href in [attrs.get("href", "#")] if tag == "a"]
    assert set(links) <= set(ids) and links


def test_the_page_reaches_nowhere(out: Path, page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    addresses = page.values("src") + [attrs["href"] for tag, attrs in page.tags if "href" in attrs]
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    policy = page.values("content")[0]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    source = (out / "report.html").read_text()
    assert set(re.findall(r"https?://[^\s\"'<]*", source)) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in re.sub(r"url\(#", "", source)


def test_the_table_of_arms_is_right(page: Page, out: Path) -> None:
    results = made_results()
    losses = [r.run.rows[-1]["eval/loss"] for r in results.results if r.run and r.job.arm == "noisy"]
    mean, half = np.mean(losses), 4.302653 * np.std(losses, ddof=1) / 3**0.5  # Student's t of 2 degrees, 97.5 %
    told = f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"
    assert told in page.text
    assert "6 collapsed" in page.text and "skewed has one more" in page.text
    markdown = (out / "report.md").read_text()
    assert escape(told) in markdown and "figures/made-load.png" in markdown


def test_the_unfinished_are_listed_with_their_reason(page: Page) -> None:
    assert "In no figure, interval or verdict: 1 of 13 runs." in page.text
    assert "even 3 diverged diverged: the loss of update 7 is not finite outputs/sweeps/made/0-3" in page.text
    assert "moe-lab train router=switch seed=3 hydra.run.dir=outputs/sweeps/made/0-3" in page.text


def test_summary_has_a_row_per_run(out: Path) -> None:
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert len(rows) == 13 and [row["state"] for row in rows].count("diverged") == 1
    assert float(rows[0]["eval/loss"]) == made_run(0, 0).rows[-1]["eval/loss"]
    assert rows[-1]["eval/loss"] == "" and rows[-1]["why"].startswith("diverged")


def test_the_same_runs_give_the_same_files(tmp_path: Path) -> None:
    one, other = ({p.name: p.read_bytes() for p in report([made_results(("a", "b"), 1)], [[]], tmp_path)} for _ in "12")
    assert one == other and len(one) == 3 + 2 * len(FIGURES)


def test_exported_figures_can_be_read(out: Path) -> None:
    for name in FIGURES:
        root = ElementTree.parse(out / f"figures/made-{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        picture = Image.open(out / f"figures/made-{name}.png").convert("RGB")
        assert picture.width >= 600 and len(picture.getcolors(1 << 24) or []) > 10
        assert picture.getpixel((1, 1)) == (255, 255, 255)


# --- names that are attacks

ATTACKS = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "</style><svg/onload=alert(1)>",
    "]]><!--",
    '"><a href="javascript:alert(1)">x</a>',
    "'-alert(1)-'",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &#x3c;",
    "$x^2$ \\frac{1}{0}$",
    "`code` **bold** [link](http://evil.example) | cell |",
    "![](http://evil.example/x.png)",
    "# heading\n- list\n\n    code",
    "=cmd|'/c calc'!A1",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "  =1+1",
    "\t=1+1",
    "\x1b[31mred\x1b[0m \x00 \u202egnirts",
    "[/red] [bold]",
    "日本語 🙂 ﷽",
    "x" * 400,
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which everything that is text is an attack."""
    folder = tmp_path_factory.mktemp("hostile")

    def attacked(text: str) -> str:
        return f"{text} {' '.join(ATTACKS)}"

    study = made_study(attacked)
    arms = tuple(" ".join(ATTACKS[i::8]) for i in range(8))
    made = made_results(arms, seeds=2, name=ATTACKS[0], rows=6, layers=1, domains=len(ATTACKS))
    results = []
    for r, attack in zip(made.results, ATTACKS[-17:], strict=True):
        job = dataclasses.replace(r.job, overrides=[attack], dir=f"{r.job.dir}{attack}")
        run = r.run
        if run is not None:
            run.env["dataset"]["train_tokens_per_domain"] = dict.fromkeys(ATTACKS, 1)
            run.rows[-1]["moe/verdict"] = list(ATTACKS[:2])
        failed = {"state": "failed", "why": attack} if r.job.seed == 1 else {}
        results.append(dataclasses.replace(r, job=job, run=run, **failed))
    sweep = dataclasses.replace(made.sweep, jobs=[r.job for r in results], command=ATTACKS[1])
    other = dataclasses.replace(made, sweep=sweep, results=results, notes=list(ATTACKS))
    report([made_results(study=study), other], [made_verdicts(study, attacked), []], folder)
    return folder


def test_nothing_in_a_name_can_run(hostile: Path, page: Page) -> None:
    attacked = Page((hostile / "report.html").read_text(encoding="utf-8"))
    shapes = {(tag, *sorted(attrs)) for tag, attrs in page.tags}
    assert {(tag, *sorted(attrs)) for tag, attrs in attacked.tags} - shapes <= {
        ("article",),
        ("h3",),
        ("use", "href", "style", "x", "y"),
    }
    for attack in ATTACKS[:12]:
        assert " ".join(attack.split()) in attacked.text
    assert not [c for c in attacked.text if not c.isprintable()]
    addresses = attacked.values("src") + attacked.values("href")
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    for path in hostile.glob("figures/*.svg"):
        tags = {node.tag.split("}")[1] for node in ElementTree.parse(path).iter()}
        assert "script" not in tags and "a" not in tags and "foreignObject" not in tags
        assert re.fullmatch(r"[a-z0-9_-]+\.svg", path.name)


def test_no_cell_is_a_formula_and_no_word_is_markdown(hostile: Path) -> None:
    cells = [cell for row in csv.reader((hostile / "summary.csv").open(newline="")) for cell in row]
    numbers = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
    assert not [c for c in cells if c.lstrip().startswith(tuple("=+-@\t\r")) and not numbers.fullmatch(c)]
    assert "'=cmd|'/c calc'!A1" in cells and "'-2+3" in cells
    for line in (hostile / "report.md").read_text().splitlines():
        if not line.startswith("    "):
            bare = re.sub(r"\\.", "", line)  # without what is escaped
            assert "<" not in bare and "`" not in bare and "evil.example)" not in bare
            assert bare.count("](") <= (1 if line.startswith("![") else 0)


# --- what the numbers mean


def test_a_digest_tells_the_load_in_fair_shares() -> None:
    run = made_run(1, 0)
    found = digest(run)
    counts = np.array(run.rows[-1]["moe/selected"])
    assert found.load_RLE[-1] == pytest.approx(counts / counts.mean(1, keepdims=True))
    assert found.final["domain beyond chance"] == pytest.approx(0.15)
    losses = np.array(run.rows[-1]["eval/moe/expert_loss"])
    assert found.final["expert loss spread"] == pytest.approx(losses.std(1).mean())


@pytest.mark.parametrize(
    "key, value",
    [("moe/selected", 3), ("moe/selected", [[1, "x"]]), ("loss", {}), ("loss", "high"), ("moe/verdict", 5),
     ("eval/moe/domain_counts", [1, 2]), ("eval/moe/expert_loss", [[1], [1, 2]])],
)  # fmt: skip
def test_what_no_run_writes_is_told_and_left_out(key: str, value: object) -> None:
    results = made_results(seeds=2)
    assert results.results[0].run is not None
    results.results[0].run.rows[-1][key] = value
    found = section(results, [])
    assert len(found.arms[0].runs) == 1
    assert [(r.job.dir, why.split(" (")[0]) for r, why in found.unfit[1:]] == [("0-0", "0-0: holds what no run writes")]


def test_undefined_numbers_are_left_out() -> None:
    run = made_run()
    for row in run.rows[:-1]:
        row["eval/loss"] = None
    run.rows[-1]["eval/loss"] = float("inf")
    run.rows[-1]["eval/moe/router_cos_matrix"] = [[[None] * 4] * 4] * 2
    found = digest(run)
    assert not len(found.curves["eval/loss"][0]) and "eval/loss" not in found.final and found.cosine_LEE is None


def test_without_experts_or_evaluations_there_are_fewer_figures(tmp_path: Path) -> None:
    results = made_results(("dense",), seeds=1)
    assert results.results[0].run is not None
    for row in results.results[0].run.rows:
        for key in [key for key in row if "moe/" in key or key.startswith("eval/")]:
            del row[key]
    report([results], [[]], tmp_path)
    assert {path.name for path in tmp_path.glob("figures/*.svg")} == {"made-loss.svg"}


def test_before_any_run_is_completed_what_there_is_is_shown(tmp_path: Path) -> None:
    made = made_results(("a",), seeds=1)
    running = [dataclasses.replace(r, state="running", why=None) for r in made.results]
    report([dataclasses.replace(made, results=running, notes=[])], [[]], tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "no run is completed: shown is what they wrote so far" in text and "Load of every expert" in text
    nothing = [dataclasses.replace(r, run=None, state="waiting", why=None) for r in made.results]
    report([dataclasses.replace(made, results=nothing, notes=[])], [[]], tmp_path)
    assert "no run has written anything yet" in Page((tmp_path / "report.html").read_text()).text


def test_the_interval_is_students() -> None:
    assert interval([1.0]) is None
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_a_band_goes_from_the_lowest_to_the_highest_seed() -> None:
    arm = Arm("a", 0, {seed: digest(made_run(1, seed)) for seed in range(3)})
    steps, mean, low, high = arm.band("loss")
    values = np.array([[row["loss"] for row in run.run.rows] for run in arm.runs.values()])
    assert steps.tolist() == [row["step"] for row in arm.runs[0].run.rows]
    assert (mean, low, high) == (
        pytest.approx(values.mean(0)),
        pytest.approx(values.min(0)),
        pytest.approx(values.max(0)),
    )
    ranked = sorted(arm.runs, key=lambda seed: arm.runs[seed].final["eval/moe/load_cv_of_ceiling/worst"])
    assert arm.typical[0] == ranked[1]


def test_what_is_even_has_no_colour() -> None:
    even, more, less, unknown = rgba(np.array([0.0, 1.0, -1.0, np.nan]))
    assert even[3] == 0 and more[3] == less[3] == 255 and more[2] > more[0] and less[0] > less[2]
    assert 0 < unknown[3] < 255 and unknown[0] == unknown[1] == unknown[2]


# Machado, Oliveira and Fernandes 2009, full severity, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protan": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deutan": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritan": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = to_xyz @ np.clip(rgb, 0, 1) / (0.9505, 1, 1.0888)
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_arms_are_told_apart_by_everybody(mode: str, out: Path) -> None:
    css = (out / "report.html").read_text().split("prefers-color-scheme: dark")[mode == "dark"]
    colours = re.findall(r"--arm\d: (#[0-9a-f]{6})", css)
    assert len(colours) == len(ARM_COLOURS) and (mode == "dark" or tuple(colours) == ARM_COLOURS)
    paper = re.search(r"--paper: (#[0-9a-f]{6})", css)
    assert paper
    light = [float(linear(c) @ (0.2126, 0.7152, 0.0722)) + 0.05 for c in (paper[1], *colours)]
    assert min(max(light[0], x) / min(light[0], x) for x in light[1:]) >= 3
    for matrix in SIGHT.values():
        seen = [lab(matrix @ linear(c)) for c in colours]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 12


def test_words() -> None:
    assert (
        number(-0.0004) == "0.000"
        and number(-1.5, 1) == "−1.5"
        and number(None) == "–"
        and number(1234567, 0) == "1,234,567"
    )
    assert slug("../../x", ["x"]) == "x-2" and slug("<>") == "study" and len(slug("a" * 100)) <= 40
    assert spread({"a": 1.0, "b": 2.0}, 1) == "1.0 in a, 2.0 in b"
    assert spread({str(i): float(i) for i in range(5)}, 0) == "from 0 in 0 to 4 in 4, median 2 over 5 arms"


def test_a_hundred_runs_stay_below_three_megabytes() -> None:
    results = made_results(tuple(f"arm_{i}" for i in range(20)), seeds=5, experts=16, layers=4, rows=60, domains=12)
    found = section(results, [])
    assert 100_000 < len(html([part(found, figures(found))], "moe-lab report").encode()) < 3_000_000

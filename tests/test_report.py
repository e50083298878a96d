"""The report is one file that a browser opens from disk, and it holds the numbers that lie beside it."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text
from PIL import Image

from deit_kd.cli import main
from deit_kd.evaluation.curves import charts_of, read_records
from deit_kd.figures import Chart, Series, as_png, as_svg, class_bars, line_charts, matrix
from tests.helpers import heads_in, refused, short

CURVES = ["heads", "images_per_second", "learning_rate", "loss"]
OF_A_RUN = ["classes", "cka", "disagreement", "reliability"]


class Page(HTMLParser):
    """The table of heads, the figures and every address of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[str] = []
        self.addresses: list[str] = []
        self.scripts = 0
        self.scores: dict[tuple[str, str, str], str] = {}
        self._run = self._head = self._score = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.addresses += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        self.scripts += tag == "script"
        if tag == "figure" and "id" in given:
            self.figures.append(given["id"])
        self._run = given.get("data-run", self._run)
        self._head = given.get("data-head", self._head if tag != "table" else "")
        self._score = given.get("data-score", "") if tag == "td" else ""

    def handle_data(self, data: str) -> None:
        if self._score and self._head:
            self.scores[self._run, self._head, self._score] = data
            self._score = ""


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    assert main(["report", str(runs / "distilled")]) == 0
    return runs / "distilled/report/report.html"


@pytest.fixture(scope="module")
def both(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    assert main(["report", str(runs / "distilled"), str(runs / "plain"), "--to", str(folder)]) == 0
    return folder


def test_the_table_holds_the_numbers_of_heads_json(page: Path) -> None:
    heads = heads_in(page.parent)
    scores = {**heads["heads"], "teacher": heads["teacher"]}
    found = Page(page.read_text()).scores
    assert len(found) == 5 * 5
    for (run, head, key), text in found.items():
        assert run == "distilled"
        assert text == f"{scores[head][key]:.{2 if key.startswith('top') else 4}f}"


def test_the_numbers_are_those_of_the_end_of_training(page: Path, runs: Path) -> None:
    reported = heads_in(page.parent)
    trained = heads_in(runs / "distilled")
    for head, score in trained["heads"].items():
        assert {key: reported["heads"][head][key] for key in score} == pytest.approx(score)


def test_the_page_needs_no_network_and_runs_nothing(page: Path) -> None:
    parsed = Page(page.read_text())
    assert parsed.scripts == 0
    assert [address[:40] for address in parsed.addresses if not address.startswith(("data:", "#"))] == []
    assert "url(http" not in page.read_text()
    assert "@import" not in page.read_text()


def test_every_figure_lies_beside_the_page_with_its_numbers(page: Path) -> None:
    figures = Page(page.read_text()).figures
    assert sorted(figures) == sorted([*CURVES, "tokens", *OF_A_RUN])
    for name in figures:
        with Image.open(page.parent / f"{name}.png") as image:
            assert min(image.size) > 250
        assert (page.parent / f"{name}.csv").is_file() or (page.parent / f"{name}.json").is_file()


def test_names_are_escaped(page: Path) -> None:
    text = page.read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;cup" in text


def test_no_two_figures_share_an_id(page: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))


def test_the_curves_are_the_records(page: Path, runs: Path) -> None:
    records = read_records(runs / "distilled")
    with open(page.parent / "loss.csv") as file:
        rows = list(csv.DictReader(file))
    expected = [record["distillation"] for record in records if record["kind"] == "step"]
    assert [float(row["y"]) for row in rows if row["series"] == "distillation"] == expected
    with open(page.parent / "heads.csv") as file:
        last = {row["series"]: float(row["y"]) for row in csv.DictReader(file)}
    final = heads_in(runs / "distilled")["heads"]
    assert last == {head: pytest.approx(score["top1"]) for head, score in final.items()}


def test_classes_are_sorted_by_what_the_token_gains(page: Path) -> None:
    with open(page.parent / "classes.csv") as file:
        rows = list(csv.DictReader(file))
    gains = [float(row["dist"]) - float(row["cls"]) for row in rows]
    assert len(rows) == 7
    assert gains == sorted(gains, reverse=True)


def test_several_runs_share_one_table_and_are_compared_image_by_image(both: Path) -> None:
    parsed = Page((both / "report.html").read_text())
    assert {(run, head) for run, head, _ in parsed.scores} == {
        *(("distilled", head) for head in ("cls", "dist", "fused_softmax", "fused_logits", "teacher")),
        ("plain", "cls"),
    }
    assert sorted(parsed.figures) == sorted(
        [*CURVES, "tokens", *(f"distilled/{name}" for name in OF_A_RUN)]
        + [f"plain/{name}" for name in OF_A_RUN if name != "cka"]
    )
    heads = heads_in(both / "plain")
    assert heads["disagreement"]["names"] == ["truth", "cls", "distilled"]


def test_a_run_writes_its_report_at_its_end_and_names_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *short(runs / "photos", run, evaluate__report=True, train__epochs=1)]) == 0
    assert (run / "report/report.html").is_file()
    assert f"report: {run / 'report/report.html'}" in capsys.readouterr().out


def test_a_run_that_is_told_not_to_writes_no_report(runs: Path, tmp_path: Path) -> None:
    assert main(["train", *short(runs / "photos", tmp_path / "run", train__epochs=1)]) == 0
    assert not (tmp_path / "run/report").exists()


def test_the_curves_of_a_run_that_is_still_going_can_be_drawn(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "going"
    folder.mkdir()
    lines = (runs / "distilled/metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0] + lines[1][:20])  # the second is being written
    assert main(["plot", str(folder)]) == 0
    with Image.open(folder / "curves.png") as image:
        assert image.width > image.height > 500


def nothing(folder: Path) -> list[str]:
    return ["plot", str(folder)]


def of_one_name(folder: Path) -> list[str]:
    runs = [folder / "a" / "x", folder / "b" / "x"]
    for run in runs:
        run.mkdir(parents=True)
    return ["report", *map(str, runs)]


def not_finished(folder: Path) -> list[str]:
    (folder / "config.yaml").write_text("{}")
    return ["report", str(folder)]


def with_record(line: str) -> Any:
    def arguments(folder: Path) -> list[str]:
        (folder / "metrics.jsonl").write_text(line + "\n")
        return ["plot", str(folder)]

    return arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (with_record('{"kind": "step", "step": 1, "classification": 1, "distillation": 1}'), ["line 1", "column 'lr'"]),
        (with_record('{"kind": "leap"}'), ["line 1", "not a record"]),
        (with_record("loss 3"), ["line 1", "not a record"]),
        (nothing, ["has no records"]),
        (lambda folder: ["report", str(folder)], ["is neither a run"]),
        (not_finished, ["not a finished run", "deit-kd plot"]),
        (lambda folder: ["report"], ["required: runs", "deit-kd report --help"]),
        (lambda folder: ["report", str(folder), "--too", "x"], ["--too"]),
        (of_one_name, ["same name"]),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, words: list[str]
) -> None:
    line = refused(arguments(tmp_path), capsys)
    assert [word for word in words if word not in line] == []


def test_curves_of_two_runs_of_one_name_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(runs / "plain", tmp_path / "plain")
    assert "has the same name; rename one" in refused(["plot", str(runs / "plain"), str(other)], capsys)


def test_one_run_has_a_line_for_each_head_and_several_a_colour_for_each_run(runs: Path) -> None:
    distilled, plain = read_records(runs / "distilled"), read_records(runs / "plain")
    alone = charts_of({"distilled": distilled})
    assert [line.name for line in alone["heads"].series] == ["cls", "dist", "fused"]
    assert len({line.colour for line in alone["heads"].series}) == 3
    together = charts_of({"distilled": distilled, "plain": plain})
    assert [line.name for line in together["loss"].series] == [
        "distilled: classification",
        "distilled: distillation",
        "plain: classification",
    ]
    assert len({line.colour for line in together["heads"].series}) == 2
    assert [key.name for key in together["loss"].keys] == ["distilled", "plain", "classification", "distillation"]
    assert [key.name for key in together["learning_rate"].keys] == ["distilled", "plain"]


def test_the_chart_of_the_loss_names_the_parts_it_draws(runs: Path) -> None:
    titles = [charts_of({name: read_records(runs / name)})["loss"].title for name in ("distilled", "plain")]
    assert titles == ["Loss: classification and distillation", "Loss: classification"]


@pytest.mark.parametrize(("weights", "drawn"), [((2.5, 0.0), True), ((2.5, 2.5), False)], ids=["falls", "constant"])
def test_weights_are_drawn_if_one_changes(weights: tuple[float, float], drawn: bool, runs: Path) -> None:
    records = [record for record in read_records(runs / "distilled") if record["kind"] == "step"][:2]
    for record, weight in zip(records, weights, strict=True):
        record["terms"] = {"guide": {"loss": 1.0, "weight": weight}}
    charts = charts_of({"run": records})
    assert "terms" in charts
    assert ("weights" in charts) == drawn


def test_a_line_of_several_runs_has_the_same_colour_in_every_chart(runs: Path) -> None:
    charts = charts_of({name: read_records(runs / name) for name in ("plain", "distilled")})
    colours = {(line.name.split(":")[0], line.colour) for chart in charts.values() for line in chart.series}
    assert len(colours) == 2


def test_the_legend_of_several_runs_covers_no_line(runs: Path) -> None:
    charts = charts_of({name: read_records(runs / name) for name in ("plain", "distilled")})
    figure = line_charts(list(charts.values()), columns=2)
    as_png(figure)
    for axis in figure.axes[: len(charts)]:
        legend = axis.get_legend()
        assert legend is not None
        assert not axis.get_window_extent().overlaps(legend.get_window_extent())


def test_long_names_do_not_cut_off_the_title_of_a_table() -> None:
    names = ["a name that is long", *"bcdefg"]
    figure = matrix("Share of images on which two predictors differ", names, names, [[0.5] * 7] * 7)
    figure.savefig(BytesIO())  # in the figure's own dots per inch
    title = next(text for text in figure.findobj(Text) if text.get_text().startswith("Share of images"))
    assert title.get_window_extent().x1 < figure.bbox.x1


def test_an_svg_takes_its_ink_and_its_width_from_the_page() -> None:
    chart = Chart("title", "x", "y", [Series("$a_b$ <i>", [1, 2], [1, 2], "#ff0000")], [("teacher", 1.5)])
    svg = as_svg(line_charts([chart]), "chart")
    assert "currentColor" in svg
    assert "<i>" not in svg
    assert not re.search(r"<svg[^>]* width=", svg)
    assert set(re.findall(r'href="#([a-z]+)', svg)) == {"chart"}


@pytest.mark.parametrize(
    "figure",
    [
        matrix("m", ["a"], ["b"], [[0.0]]),
        class_bars("b", ["a", "a long name that goes on and on"], {"cls": [None, 50.0]}),
        line_charts([Chart("t", "x", "y", [Series("s", [1], [1], "#000000")])] * 3, columns=2),
    ],
)
def test_figures_of_odd_numbers_can_be_drawn(figure: Any) -> None:
    assert as_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("y", [[3.0], [3.0, math.nan], [math.nan, 3.0, math.nan]])
def test_a_line_of_one_value_is_drawn_as_a_point(y: list[float]) -> None:
    series = Series("s", range(len(y)), y, "#000000")
    assert line_charts([Chart("t", "x", "y", [series])]).axes[0].lines[0].get_marker() == "o"


def test_a_place_without_a_chart_stays_empty() -> None:
    figure = line_charts([Chart("t", "x", "y", [Series("s", [1], [1], "#000000")])] * 3, columns=2)
    assert [axis.axison for axis in figure.axes] == [True, True, True, False]


PROBE = """
<body><iframe src="report.html" style="width: 390px; height: 800px; border: 0"></iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const small = [...page.querySelectorAll("figure svg, figure img")].filter(figure => {
    if (figure.closest("details:not([open])")) return false;
    const {width, height} = figure.getBoundingClientRect();
    return width < 60 || height < 60;
  });
  document.body.dataset.found = JSON.stringify({
    width: page.documentElement.clientWidth,
    scrolls: page.documentElement.scrollWidth,
    small: small.length,
    figures: page.querySelectorAll("figure svg").length,
    images: [...page.images].filter(image => image.naturalWidth === 192).length,
    ground: getComputedStyle(page.body).backgroundColor,
    top1: page.querySelector("tr[data-head=fused_softmax] td[data-score=top1]").firstChild.data,
  });
});
</script>
"""


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize(("scheme", "ground"), [("1", "rgb(255, 255, 255)"), ("0", "rgb(21, 23, 27)")])
def test_a_browser_shows_every_figure_on_a_phone_without_scrolling_sideways(
    page: Path, tmp_path: Path, scheme: str, ground: str
) -> None:
    shutil.copy(page, tmp_path / "report.html")
    (tmp_path / "probe.html").write_text(PROBE)
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-sync",
    ]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path / 'probe.html'}"], capture_output=True, text=True, timeout=90)
    assert ":CONSOLE" not in done.stderr
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match
    found = json.loads(match[1].replace("&quot;", '"'))
    heads = heads_in(page.parent)
    portraits = 16
    assert found == {
        "width": 390,
        "scrolls": 390,
        "small": 0,
        "figures": len(CURVES) + 1 + len(OF_A_RUN),
        "images": portraits * (1 + 2 * 2 + 2 * 2),
        "ground": ground,
        "top1": f"{heads['heads']['fused_softmax']['top1']:.2f}",
    }

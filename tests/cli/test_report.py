"""``launch report``, opened in a real browser."""

from __future__ import annotations

import base64
import html
import json
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigError, EnvironmentProblem
from launcher.protocol.metrics import MetricsWriter, SampleWriter
from launcher.runs.report.charts import charts_of, read_curves, segments, thin_out, ticks
from launcher.runs.report.html import render_macro, render_markdown
from launcher.utils.files import write_json
from tests.browser import open_browser
from tests.helpers import launch_verb

run = launch_verb("report")

HOSTILE = "</title><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def open_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Any]]:
    """Open a file, moved away from whatever lies beside it; no console error may have come."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with open_browser() as browser:

        def show(file: Path) -> Any:
            browser.get(shutil.copy(file, folder / "page.html").as_uri())
            assert [line for line in browser.get_log("browser") if line["level"] != "INFO"] == []
            for details in browser.find_elements("tag name", "details"):
                browser.execute_script("arguments[0].open = true", details)
            for drawing in browser.find_elements("css selector", "svg, img, polyline"):
                assert min(drawing.size.values()) >= 0 < max(drawing.size.values())
            return browser

        yield show


def reported(capsys: pytest.CaptureFixture[str], *words: str) -> Path:
    assert run(words) == 0
    return Path(capsys.readouterr().out.removeprefix("report: ").strip())


@pytest.mark.filterwarnings("ignore")  # of the driver's own
def test_a_real_run_in_a_browser(capsys, completed, monkeypatch, open_page) -> None:
    monkeypatch.chdir(completed)
    (folder,) = completed.glob("runs/*/2*")
    file = reported(capsys)
    assert file == folder / "report.html"
    page = open_page(file)
    text = page.find_element("tag name", "body").text
    result = json.loads((folder / "result.json").read_text())
    for word in ("completed", "3 of 3", f"launch rerun {folder}", "loss, nats a token", "sample_tokens: 4"):
        assert word in text
    assert f"{result['metrics']['train/loss']:,.6g}" in text
    assert "launcher.jobs.torchrun" in text, "the plan"
    assert json.loads((folder / "environment.json").read_text())["torch"] in text
    drawings = page.find_elements("tag name", "svg")
    assert len(drawings) >= 5
    assert all(drawing.size["width"] > 200 < drawing.size["height"] * 2 for drawing in drawings)
    lines = page.find_elements("css selector", "figure:first-of-type polyline")
    assert len(lines[0].get_attribute("points").split()) == 3


@pytest.mark.filterwarnings("ignore")
def test_nothing_in_a_run_becomes_markup(capsys, make_run, gone, open_page) -> None:
    run_dir = make_run(HOSTILE.partition("/")[0] + "b>", name="a&b", status="failed", exit_code=1, session=gone)
    plan = json.loads(run_dir.plan.read_text())
    write_json(run_dir.plan, {**plan, "name": HOSTILE, "run_id": HOSTILE})
    victims = [{"rank": HOSTILE, "host": HOSTILE, "exit_code": 1, "signal": None}]
    failure = {"reason": HOSTILE, "error": HOSTILE, "traceback": HOSTILE, "host": HOSTILE, "victims": victims}
    write_json(run_dir.failure, failure)
    write_json(run_dir.environment, {HOSTILE: HOSTILE})
    run_dir.snapshot.write_text(f"job: {{'{HOSTILE.replace(chr(39), '')}': 1}}\n")
    run_dir.sample.write_text(HOSTILE)
    with SampleWriter(run_dir.samples) as samples:
        samples.record(1, prompt=HOSTILE, text=HOSTILE)
    run_dir.benchmark("md").write_text(
        f"# {HOSTILE}\n\n- {HOSTILE}\n\n| {HOSTILE} | b |\n|---|---|\n| `{HOSTILE}` | 1 |\n"
    )
    run_dir.benchmark("png").write_bytes(PIXEL)
    with MetricsWriter(run_dir.metrics) as metrics:
        for step in (1, 2):
            metrics.record(step, **{HOSTILE: float(step), "train/loss": 1.0 / step})
    page = open_page(reported(capsys))
    assert page.title == f"{HOSTILE} {HOSTILE}"
    assert page.find_elements("tag name", "script") == []
    assert len(page.find_elements("tag name", "img")) == 1, "the picture of the benchmark"
    assert page.execute_script("return document.images[0].naturalWidth") == 1
    text = page.find_element("tag name", "body").text
    assert text.count("document.title='owned'") > 15
    assert "Why it failed" in text
    assert "Samples at evaluations" in text


class Addresses(HTMLParser):
    """Collects whatever leads out of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            f"{tag} {key}={value}" for key, value in attrs if key in ("src", "href", "action", "data", "onload")
        ]


def test_no_secret_and_no_address_gets_into_it(capsys, make_run, gone, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct-<horse>&battery")
    monkeypatch.setenv("PWD", str(Path.cwd()))
    run_dir = make_run(status="failed", exit_code=1, session=gone, step=3)
    write_json(run_dir.failure, {"reason": "it failed", "traceback": "asked with correct-<horse>&battery"})
    text = reported(capsys).read_text()
    assert "asked with ********" in text
    assert "horse" not in text
    assert str(run_dir.path) in text, "where one works is no secret"
    reader = Addresses()
    reader.feed(text)
    assert reader.found == []
    assert "default-src 'none'" in html.unescape(text)


def test_several_runs_lie_over_each_other(capsys, make_run, gone, tmp_path) -> None:
    for number, seed in enumerate((1, 2)):
        one = make_run(f"2026010{number}-a", status="completed", session=gone)
        one.snapshot.write_text(f"job:\n  seed: {seed}\n  steps: 9\nrun:\n  dir: x{number}\n")
        with MetricsWriter(one.metrics) as metrics:
            for step in range(4):
                metrics.record(step, **{"train/loss": 5.0 - step / (seed + 1), "eval/loss": 5.0})
    file = reported(capsys, "20260100", "20260101")
    assert file == tmp_path / "report.html"
    text = file.read_text()
    (drawing,) = [part for part in text.split("<figure>") if "loss, nats a token" in part]
    assert drawing.count("<polyline") == 4
    assert drawing.count("stroke-dasharray") == 2, "what was held out, in the colour of its run"
    assert len(set(drawing.split('stroke="')[1::2])) == 2
    differing = text.partition("Configurations, where they differ")[2].partition("</section>")[0]
    assert "job.seed" in differing
    assert not {"job.steps", "run.dir"} & set(differing.replace("<", ">").split(">"))


def test_a_sweep_with_its_best_trial(capsys, make_run, gone, tmp_path) -> None:
    rows = []
    for number, (loss, status) in enumerate(((3.0, "completed"), (2.0, "completed"), (1.0, "failed"))):
        one = make_run(f"sweep-2026/{number:03d}", status=status, exit_code=int(loss == 1.0), session=gone, step=3)
        write_json(one.result, {"status": status, "exit_code": 0, "metrics": {"train/loss": loss / 2}})
        rows.append({"overrides": [f"optimizer.lr={number}e-4"], "run_dir": f"/gone/{one.path.name}", "exit_code": 0})
        rows[-1] |= {"status": status, "eval/loss": loss}
    folder = tmp_path / "runs" / "tiny" / "sweep-2026"
    write_json(folder / "sweep.json", {"metric": "eval/loss", "goal": "minimize", "trials": rows})
    for word in ("sweep-20", "tiny/sweep-2026", str(folder)):
        assert reported(capsys, word) == folder / "report.html"
    trials = (folder / "report.html").read_text().partition("Trials, minimize eval/loss")[2].partition("</section>")[0]
    best = [row for row in trials.split("<tr>") if "<td>best</td>" in row]
    assert len(best) == 1
    assert "optimizer.lr=1e-4" in best[0]
    assert "<td>1</td></tr>" in best[0], "the last training loss, from the run itself although it was moved"
    assert reported(capsys, "sweep-2026/001", "--output", "one.html") == Path("one.html")
    assert "sweep-2026/001" in Path("one.html").read_text()


def part(text: str, title: str, end: str = "</section>") -> str:
    """Return what stands between a title and the next end."""
    return text.partition(title)[2].partition(end)[0]


def test_profiles_samples_and_files_are_shown(capsys, make_run, gone) -> None:
    run_dir = make_run(status="completed", session=gone, step=3)
    (run_dir.checkpoints / "step_00000003").mkdir(parents=True)
    run_dir.log_of("box", 0).write_text("x" * 12)
    (run_dir.path / ".lock").touch()
    (run_dir.path / "elsewhere").symlink_to("/etc")
    run_dir.samples.write_text(
        '{"train/step": 1, "prompt": "a", "text": "first"}\n{"prompt": 3, "text": "no prompt"}\n'
        '{"train/step": 2, "prompt": "a", "text": "second"}\n'
    )
    run_dir.profile.mkdir()
    for name in ("rank0", "rank1"):
        (run_dir.profile / f"{name}.operators.md").write_text(f"## operators of {name}\n")
    memory = {"cpu": {"timeline": [[0.0, 0], [1.0, 4096]]}, "cuda:0": {"timeline": [[0.0, 0], [1.0, 2e9]]}}
    write_json(run_dir.profile / "rank0.memory.json", memory)
    (run_dir.profile / "rank0.trace.json.gz").touch()
    text = reported(capsys).read_text()
    assert text.count("while it was recorded</figcaption>") == 2, "of rank 0; rank 1 recorded no memory"
    assert "2 G<" in part(text, "memory of cuda:0", "</figure>"), "the largest value beside its axis"
    assert "operators of rank1" in text
    assert text.count(str(run_dir.profile / "rank0.trace.json.gz")) == 1
    samples = part(text, "Samples at evaluations")
    assert samples.index("first") < samples.index("second")
    assert "no prompt" not in samples
    files = part(text, "Files<")
    assert {"checkpoints/", "logs/box.0.log", "profile/rank0.memory.json", "elsewhere (a symbolic link)"} <= set(
        files.replace("<", ">").split(">")
    )
    assert "step_00000003" not in files
    assert ".lock" not in files


def test_a_loss_has_its_gaps_and_the_losses_to_beat() -> None:
    points = [(1, 3.0), (2, 2.0), (3, None), (4, None), (5, 1.0), (6, 1.5), (7, None)]
    assert list(segments(points)) == [[(1, 3.0), (2, 2.0)], [(5, 1.0), (6, 1.5)]]
    beaten = {"baseline/unigram": [(1, 2.5)], "baseline/unknown": [(1, None)]}
    (drawing,) = charts_of({"a": {"train/loss": points, **beaten}})
    assert "unigram 2.50" in drawing
    assert "unknown" not in drawing
    assert "unigram" not in "".join(charts_of({"a": {"train/loss": points, **beaten}, "b": {"train/loss": points}}))


def test_mistakes(make_run, tmp_path) -> None:
    make_run(status="completed")
    for words, said in (
        (("nope",), "is not a run directory"),
        (("--output", str(tmp_path)), "is a folder"),
        (("--output", str(tmp_path / "no" / "a.html")), "there is no folder"),
        (("--outptu=x",), "did you mean --output"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(words)
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        run(["--output", "/proc/a.html"])
    assert not list(tmp_path.glob("**/*.html"))
    for name in ("sweep-a", "sweep-b"):
        (tmp_path / "runs" / "tiny" / name).mkdir()
        write_json(tmp_path / "runs" / "tiny" / name / "sweep.json", {"metric": 1})
    with pytest.raises(ConfigError, match="2 sweeps begin with it"):
        run(["sweep-"])
    with pytest.raises(ConfigError, match=r"is not a valid sweep\.json"):
        run(["sweep-a"])


def test_a_report_of_an_earlier_version_is_replaced(capsys, make_run) -> None:
    run_dir = make_run(status="completed")
    file = reported(capsys)
    file.write_text(file.read_text().replace("&#39;", "&#x27;"))
    assert reported(capsys) == file
    run_dir.path.joinpath("page.html").write_text("<html>default-src</html>")
    with pytest.raises(ConfigError, match="is not a report"):
        run(["--output", str(run_dir.path / "page.html")])


def test_help(capsys) -> None:
    assert run(["--help"]) == 0
    assert "launch report" in capsys.readouterr().out


def test_curves_keep_what_matters(tmp_path: Path) -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    kept = thin_out(points)
    assert len(kept) <= 600
    assert points[77_777] in kept
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert list(segments([(1, 2.0), (2, None), (3, 4.0), (4, 5.0)])) == [[(1, 2.0)], [(3, 4.0), (4, 5.0)]]
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(1e-4, 9e-4) == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4])
    with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
        for step, loss in enumerate((3.0, float("nan"), 1.0, 2.0)):
            metrics.record(
                step, **{"train/loss": loss, "train/skipped": 0.0, "once": 1.0} if step else {"train/loss": loss}
            )
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert curves["train/loss"] == [(0, 3.0), (1, None), (2, 1.0), (3, 2.0)]
    loss, once = charts_of({"a": curves})
    (line,) = loss.split('points="')[1:]
    heights = [float(place.split(",")[1]) for place in line.split('"')[0].split()]
    assert heights[0] > heights[1], "1 stands below 2, and lower is a larger y"
    assert "<circle" in loss, "the value before the gap"
    assert "once" in once


def test_markdown_of_runs() -> None:
    page = "# One\n\n- a `b|c`\n\n| x | y |\n| --- | --- |\n| | 1 |\n\ntwo\nlines\n"
    assert render_markdown(page) == (
        '<h3>One</h3><ul><li>a <code>b|c</code></li></ul><div class="wide"><table><thead><tr><th>x</th><th>y</th></tr>'
        "</thead><tbody><tr><td></td><td>1</td></tr></tbody></table></div><p>two lines</p>"
    )


def test_a_value_is_cleaned_before_it_is_escaped() -> None:
    assert (
        render_macro("code", "\x1b[31m<red>\x1b[0m HF_TOKEN=hunter22") == "<code>&lt;red&gt; HF_TOKEN=********</code>"
    )

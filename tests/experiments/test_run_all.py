"""The report of everything: one page that needs no other file, and that a phone can show."""

import html
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.kit.experiments import document, functions, run

ONLY = ("layouts", "decode", "texture_vs_global", "prefix_sharing")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VOID = {"meta", "img", "br", "hr", "link", "input"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    printed, _ = run("run_all", "--smoke", "--backend", "host", "--out", str(out), "--only", *ONLY)
    return printed, out / "report.html"


class Page(HTMLParser):
    """Keeps what a page holds; raises where a tag is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.images, self.links, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        self.images += [attributes] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_no_other_file(report):
    page = Page(report[1].read_text(encoding="utf-8"))
    assert page.ids == ["claims", *ONLY]
    assert len(page.images) >= 3 and all(image["alt"] for image in page.images)
    for link in page.links:
        assert link.startswith("data:image/png;base64,") or link.removeprefix("#") in page.ids
    assert "script" not in "".join(page.text).lower() and "@import" not in "".join(page.text)


def test_the_page_says_what_was_found_and_what_needs_a_gpu(report):
    printed, path = report
    page = " ".join(" ".join(Page(path.read_text(encoding="utf-8")).text).split())
    for name in ("layouts", "texture_vs_global", "prefix_sharing"):
        assert document(path.parent, name, picture=False)["conclusion"] in page
    assert "python experiments/decode.py: not run: needs a GPU" in page
    assert "Does the layout of the KV cache matter, and where?" in page and "A smoke run" in page
    wanted = "For want of a GPU: requests served, swap"
    assert f"{wanted}, texture 5x" in page and wanted in printed


def test_text_from_results_cannot_become_markup():
    script = functions("run_all")
    outcome = script["Outcome"]("layouts", "failed with status 1: <b>")
    outcome.documents = [{"experiment": "x", "conclusion": "1 < 2 & <script>", "rows": [{"a<b": "<i>", "n": 1.5}]}]
    page = Page(script["html"].page("<t>", script["parts"](outcome)))
    assert not page.ids and "1 < 2 & <script>" in "".join(page.text) and "a<b" in page.text and "<i>" in page.text


def test_an_experiment_that_fails_or_cannot_run_is_said(tmp_path, monkeypatch):
    script = functions("run_all")
    monkeypatch.setitem(script["run"].__globals__, "HERE", tmp_path)
    (tmp_path / "layouts.py").write_text("raise SystemExit('cells are wrong')")
    (tmp_path / "peers.py").write_text("import sys; print('no compiler', file=sys.stderr); sys.exit(69)")
    (tmp_path / "batching.py").write_text("import sys; print('no such option', file=sys.stderr); sys.exit(2)")
    assert script["run"]("layouts", "host", tmp_path, True).status == "failed with status 1: cells are wrong"
    assert script["run"]("peers", "host", tmp_path, True).status == "not run: no compiler"
    assert script["run"]("batching", "host", tmp_path, True).status == "failed with status 2: no such option"
    assert script["run"]("decode", "host", tmp_path, True).status == "not run: needs a GPU"


@pytest.mark.parametrize(("backend", "cores"), [("host", 64), ("cuda", 2), ("cuda", 64)])
def test_all_are_run_once_and_reported_in_order(backend, cores, tmp_path, monkeypatch):
    script = functions("run_all")
    names, calls = list(script["EXPERIMENTS"]), []
    patched = script["run_each"].__globals__
    monkeypatch.setitem(patched, "run", lambda name, *_: calls.append(name) or script["Outcome"](name, "ok"))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    outcomes = script["run_each"](names, backend, tmp_path, True)
    assert [outcome.name for outcome in outcomes] == names and sorted(calls) == sorted(names)
    if (backend, cores) == ("cuda", 64):  # with nothing beside it
        assert set(calls[-len(script["TIMES_THE_CPU"]) :]) == script["TIMES_THE_CPU"]


def test_files_of_an_earlier_run_are_left_out(tmp_path, monkeypatch):
    script = functions("run_all")
    monkeypatch.setitem(script["run"].__globals__, "HERE", tmp_path)
    (tmp_path / "layouts.py").write_text("")
    (tmp_path / "layouts.json").write_text("{}")
    os.utime(tmp_path / "layouts.json", (0, 0))
    outcome = script["run"]("layouts", "host", tmp_path, True)
    assert outcome.status == "ok" and not outcome.documents


def test_a_result_that_is_not_whole_has_failed(tmp_path, monkeypatch):
    script = functions("run_all")
    monkeypatch.setitem(script["run"].__globals__, "HERE", tmp_path)
    (tmp_path / "layouts.py").write_text("open('layouts.json', 'w').write('{\"rows\": [')")
    monkeypatch.chdir(tmp_path)
    outcome = script["run"]("layouts", "host", tmp_path, True)
    assert outcome.status.startswith("failed: layouts.json is not JSON: ") and not outcome.documents


def test_what_hangs_is_stopped(tmp_path, monkeypatch):
    script = functions("run_all")
    monkeypatch.setitem(script["run"].__globals__, "HERE", tmp_path)
    monkeypatch.setattr(script["EXPERIMENTS"]["layouts"], "longest_s", 2)
    (tmp_path / "layouts.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[0]).with_name('child').write_text(str(child.pid))\n"
        "print('so far', flush=True)\n"
        "time.sleep(60)\n"
    )
    outcome = script["run"]("layouts", "host", tmp_path, True)
    assert outcome.status == "failed: stopped after 2 s: so far" and outcome.seconds < 30
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline, "what the experiment started goes on"
        time.sleep(0.05)


def is_running(process):
    """Whether a process is there and not merely waited for, which Linux tells."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_every_experiment_is_run_or_makes_the_report():
    scripts = {path.stem for path in (Path(__file__).parents[2] / "experiments").glob("*.py")}
    assert scripts == {*functions("run_all")["EXPERIMENTS"], "claims", "run_all"}


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_without_scrolling_sideways(report, width, tmp_path):
    """In a frame as wide as a phone, or a desk's screen, every table unfolded."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on PATH: {', '.join(BROWSERS)} (Debian: apt-get install chromium)")
    wrapper = tmp_path / "frame.html"
    text = report[1].read_text(encoding="utf-8").replace("<details>", "<details open>")
    wrapper.write_text(
        f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(text, quote=True)}"></iframe>'
        "<script>onload = () => { const page = document.querySelector('iframe').contentDocument;"
        " const broken = [...page.images].filter(image => !image.naturalWidth).length;"
        " document.title = [page.documentElement.scrollWidth, page.documentElement.clientWidth, page.images.length,"
        " broken, page.querySelectorAll('.card').length].join(' '); }</script>",
        encoding="utf-8",
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=20000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", wrapper.as_uri()]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>([\d ]+)</title>", answer.stdout)
    assert found, answer.stderr[-500:]
    content, shown, images, broken, cards = map(int, found[1].split())
    assert width - 20 <= shown <= width and content <= shown
    assert images >= 3 and broken == 0 and cards >= 15

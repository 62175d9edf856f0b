import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from moelab import report
from moelab.parameters import ParameterError
from moelab.report import ReportError

ROOT = Path(report.__file__).resolve().parents[1]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'

DEFAULTS = """\
arch: str = "gfx950"  # compile target
stages: str = "1,2"  # pipeline depths
note: str = "a=b"
"""
GUARD = """\
from moelab.parameters import given
given(globals(), ["arch", "stages", "note"])
"""


def code(source, *tags, outputs=()):
    return new_code_cell(source, metadata={"tags": list(tags)}, outputs=list(outputs))


def write(path, *cells, **metadata):
    nbformat.write(new_notebook(cells=list(cells), metadata=metadata), path)
    return path


def shows(mime, data, **metadata):
    return new_output("display_data", data={mime: data}, metadata=metadata)


def rendered(tmp_path, *cells, **metadata):
    """Render cells as they are, without a kernel."""
    source = write(tmp_path / "cells.ipynb", *cells, **metadata)
    return report.to_html(source, tmp_path / "cells.html").read_text()


def body(text):
    """Return the page without our own style and script."""
    return re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL)


class References(HTMLParser):
    """Collect what a page would load."""

    LOADS = ("src", "href", "srcset", "poster", "data", "action", "background")

    def __init__(self, text):
        super().__init__()
        self.found = re.findall(r"url\(\s*['\"]?(?!data:)([^)]+)", text)
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name.split(":")[-1] in self.LOADS and not (tag == "a" and name == "href"):
                self.found += [] if (value or "").startswith("data:") else [f"{tag} {value}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run with parameters, in a home whose python3 kernelspec is broken."""
    folder = tmp_path_factory.mktemp("run {0}")
    spec = folder / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"})
    )
    source = write(
        folder / "sweep.ipynb",
        new_markdown_cell("# Which tile *wins*?\n\nProse."),
        code(DEFAULTS, "parameters"),
        code(GUARD),
        new_markdown_cell("## What was measured"),
        code(
            "import os, sys, time\nprint('<b>' + sys.prefix + '</b>')\n"
            "os.write(1, b'raw\\n'); time.sleep(0.2)"
        ),
        code("secret_of_the_cell = 1", "remove_cell"),
        code("hidden_input = 2\nprint('shown', arch, stages)", "hide-input"),
    )
    before = source.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, pathlib; from moelab import report;"
                "report.render(sys.argv[1], {'arch': 'gfx942', 'stages': (3, 4)},"
                "pathlib.Path(sys.argv[2]))",
                str(source),
                str(folder / "out"),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert process.returncode == 0, process.stderr
    return {
        "process": process,
        "before": before,
        "source": source,
        "html": (folder / "out" / "sweep.html").read_text(),
        "notebook": nbformat.read(folder / "out" / "sweep.ipynb", as_version=4),
    }


def test_kernel_runs_in_the_current_environment_whatever_the_users_kernelspec(run):
    assert f"&lt;b&gt;{sys.prefix}&lt;/b&gt;" in run["html"]


def test_stdout_stays_empty_and_stderr_shows_progress_only(run):
    assert run["process"].stdout == ""
    lines = [line for line in re.split(r"[\r\n]+", run["process"].stderr) if line.strip()]
    assert lines
    assert [line for line in lines if not line.startswith("Executing")] == []


def test_executed_notebook_holds_the_parameters_and_the_input_is_untouched(run):
    injected = [
        c for c in run["notebook"].cells if "injected-parameters" in c.metadata.get("tags", [])
    ]
    assert 'arch = "gfx942"' in injected[0].source
    assert "stages = [3, 4]" in injected[0].source
    assert run["source"].read_bytes() == run["before"]


def test_html_loads_nothing(run):
    assert References(run["html"]).found == []
    assert "cdnjs" not in run["html"] and "unpkg" not in run["html"]
    policy = re.search(r'<meta[^>]*http-equiv="Content-Security-Policy"[^>]*>', run["html"])
    assert POLICY in policy[0]
    assert policy.start() < run["html"].index("<style")


def test_code_is_folded_and_complete(run):
    boxes = re.findall(r'<details class="code">.*?</details>', run["html"], re.DOTALL)
    text = [html.unescape(re.sub(r"<[^>]+>", "", box)) for box in boxes]
    assert any("from moelab.parameters import given" in t for t in text)
    assert any('note: str = "a=b"' in t and "stages = [3, 4]" in t for t in text)
    assert '<details class="code" open' not in run["html"]


def test_tags_hide_what_they_say(run):
    assert "secret_of_the_cell" not in run["html"]
    assert "hidden_input" not in run["html"]
    assert "shown gfx942 [3, 4]" in run["html"]


def test_title_and_contents_come_from_the_headings(run):
    assert "<title>Which tile wins?</title>" in run["html"]
    for place in re.findall(r'<ol class="toc-list">.*?</ol>', run["html"]):
        assert re.findall(r'href="#([^"]+)"', place) == ["which-tile-wins", "what-was-measured"]
    assert run["html"].count('id="what-was-measured"') == 1


def test_parameters_of_the_run_are_a_table(run):
    box = re.search(r'<details class="parameters">.*?</table>', run["html"], re.DOTALL)[0]
    text = html.unescape(re.sub(r"<[^>]+>", " ", box))
    assert re.search(r'arch\s+"gfx942"\s+"gfx950"\s+compile target', text)
    assert 'arch = "gfx942", stages = [3, 4]' in text


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """A cell that raises and a kernel that dies."""
    folder = tmp_path_factory.mktemp("failures")
    cells = {
        "raises": "raise KeyError('lds <limit>')",
        "dies": "import os, signal, time\n"
        "os.write(2, b'LLVM ERROR: out of registers\\n'); time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
    }
    errors = {}
    for name, source in cells.items():
        path = write(
            folder / f"{name}.ipynb",
            new_markdown_cell("# A run"),
            code("print('done before')"),
            code(source, "remove_cell"),
            code("print('never')"),
        )
        with pytest.raises(ReportError) as error:
            report.render(path, {}, folder / "out", progress=False)
        errors[name] = error.value
    return errors


@pytest.mark.parametrize(("name", "ename"), [("raises", "KeyError"), ("dies", "DeadKernelError")])
def test_failure_keeps_both_files_and_shows_itself(failures, name, ename):
    error = failures[name]
    page = error.html.read_text()
    assert "done before" in page and "This run failed." in page and ename in page
    link = re.search(r'class="banner".*?href="#([^"]+)"', page, re.DOTALL)[1]
    assert "failed" in re.search(rf'<section [^>]*id="{re.escape(link)}"[^>]*>', page)[0]
    outputs = [c.outputs for c in nbformat.read(error.notebook, 4).cells if "outputs" in c]
    assert [len(o) for o in outputs] == [1, len(outputs[1]), 0]
    assert ename in str(error) and str(error.html) in str(error)
    assert str(error.notebook) in str(error)
    assert "Traceback" not in str(error)


def test_last_words_of_a_dead_kernel_are_kept(failures):
    assert "LLVM ERROR: out of registers" in failures["dies"].html.read_text()


def test_error_text_is_inert(failures):
    assert "lds &lt;limit&gt;" in failures["raises"].html.read_text()


@pytest.fixture
def never_runs(monkeypatch):
    import papermill

    def fail(*args, **kwargs):
        raise AssertionError("the notebook ran")

    monkeypatch.setattr(papermill, "execute_notebook", fail)


def test_unknown_parameter_raises_before_anything_runs(tmp_path, never_runs):
    source = write(tmp_path / "a.ipynb", code(DEFAULTS, "parameters"))
    with pytest.raises(ParameterError) as error:
        report.render(source, {"stage": 2}, tmp_path / "out")
    assert "did you mean 'stages'?" in str(error.value)
    assert 'arch: str = "gfx950"  # compile target' in str(error.value)
    assert 'note: str = "a=b"' in str(error.value)
    assert not (tmp_path / "out").exists()


def test_parameter_of_a_notebook_without_parameters_raises(tmp_path, never_runs):
    source = write(tmp_path / "a.ipynb", code("1"))
    with pytest.raises(ParameterError, match="no parameters"):
        report.render(source, {"stages": 2}, tmp_path / "out")


def test_value_that_papermill_would_turn_into_a_string_raises(tmp_path, never_runs):
    source = write(tmp_path / "a.ipynb", code(DEFAULTS, "parameters"))
    with pytest.raises(ParameterError, match=r"stages: .* is set"):
        report.render(source, {"stages": {1, 2}}, tmp_path / "out")


def test_a_report_may_have_another_name_than_its_notebook(tmp_path):
    source = write(tmp_path / "cells.ipynb", new_markdown_cell("# Which?"))
    html = report.render(source, {}, tmp_path / "out", name="another", progress=False)
    assert html == tmp_path / "out" / "another.html"
    assert html.with_suffix(".ipynb").is_file()


def test_a_report_in_one_file_replaces_a_report_and_leaves_nothing_beside_it(tmp_path):
    source = write(tmp_path / "cells.ipynb", new_markdown_cell("# Which?"))
    page = tmp_path / "page.html"
    for _ in range(2):
        assert report.render_to(source, {}, page) == page
        assert "Which?" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.ipynb", "page.html"]


def test_a_report_that_fails_leaves_the_one_before_as_it_was(tmp_path):
    page = report.render_to(
        write(tmp_path / "a.ipynb", new_markdown_cell("# Was?")), {}, tmp_path / "page.html"
    )
    before = page.read_bytes()
    with pytest.raises(ReportError, match="ZeroDivisionError"):
        report.render_to(write(tmp_path / "b.ipynb", code("1 / 0")), {}, page)
    assert page.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.html", "<html><head><title>moelab</title></head></html>"),
        ("page.html", ""),
        ("page.html", None),
        ("rows.parquet", "PAR1"),
        ("notes.txt", "as it was"),
    ],
)
def test_what_is_no_report_is_never_replaced(tmp_path, never_runs, name, content):
    there = tmp_path / name
    there.mkdir() if content is None else there.write_text(content)
    with pytest.raises(ValueError, match=r"choose another name|a report is a page; name it"):
        report.render_to("01_stage_sweep", {}, there)
    assert content is None or there.read_text() == content


def test_a_report_makes_no_folder_of_a_mistyped_name(tmp_path, never_runs):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; make it first"):
        report.render_to("01_stage_sweep", {}, tmp_path / "nowhere" / "page.html")


def test_input_is_never_the_output(tmp_path, never_runs):
    source = write(tmp_path / "a.ipynb", code("1"))
    before = source.read_bytes()
    with pytest.raises(ReportError, match="out_dir"):
        report.render(source, {}, tmp_path / "x" / "..")
    assert source.read_bytes() == before


def test_bare_name_is_found_and_an_unknown_one_lists_all(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    path = write(tmp_path / "notebooks" / "99_test_only.ipynb", code("1"))
    monkeypatch.chdir(tmp_path)
    assert report.find("99_test_only").resolve() == path
    with pytest.raises(FileNotFoundError) as error:
        report.find("99_test_onyl")
    assert "did you mean 99_test_only?" in str(error.value)
    assert "There are: " in str(error.value)


def test_guard_also_stops_plain_papermill(tmp_path, monkeypatch):
    import papermill

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source = write(tmp_path / "a.ipynb", code(DEFAULTS, "parameters"), code(GUARD))
    with pytest.raises(papermill.PapermillExecutionError) as error:
        papermill.execute_notebook(
            str(source),
            str(tmp_path / "b.ipynb"),
            {"stage": 2},
            kernel_name="python3",
            language="python",
            progress_bar=False,
        )
    assert error.value.ename == "ParameterError"
    assert "did you mean 'stages'?" in error.value.evalue


def test_import_leaves_papermill_and_nbconvert_alone():
    check = (
        "import sys, moelab.report\n"
        "print([m for m in ('papermill', 'nbconvert', 'jupyter_client') if m in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert process.stdout == "[]\n"


@pytest.mark.parametrize(
    ("to_file", "progress", "shown"),
    [(False, True, True), (True, True, False), (False, False, False)],
)
def test_progress_goes_to_a_terminal_or_pipe_and_leaves_a_log_file_alone(
    tmp_path, to_file, progress, shown
):
    bar = "import os\nopen(os.environ['MOELAB_PROGRESS'], 'w').write('9 of 10')"
    source = write(tmp_path / "bar.ipynb", code(bar))
    script = (
        "from pathlib import Path; from moelab.report import render; import sys; "
        f"render({str(source)!r}, {{}}, Path({str(tmp_path / 'out')!r}), progress={progress})"
    )
    log = tmp_path / "log"
    log.write_text("kept ")
    with log.open("a") as file:
        process = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            stderr=file if to_file else subprocess.PIPE,
            check=True,
        )
    said = log.read_text() if to_file else process.stderr.decode()
    assert ("9 of 10" in said) is shown
    assert log.read_text().startswith("kept ")


def test_the_engine_is_papermills_entry_point():
    from importlib.metadata import entry_points

    from moelab.engine import MoelabEngine

    (entry,) = entry_points(group="papermill.engine", name="moelab")
    assert entry.load() is MoelabEngine


def test_text_outputs_are_inert(tmp_path):
    attack = "<script>alert(1)</script>"
    page = rendered(
        tmp_path,
        code(
            f"'{attack}'",
            outputs=[
                new_output("stream", name="stdout", text=attack),
                new_output("stream", name="stderr", text=f"\x1b[31m{attack}\x1b[0m"),
                new_output("execute_result", data={"text/plain": attack}),
                new_output("error", ename=attack, evalue=attack, traceback=[attack]),
            ],
        ),
        code(f"x = '{attack}'", "parameters"),
    )
    assert attack not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8


def test_title_is_inert(tmp_path):
    page = rendered(tmp_path, new_markdown_cell("# a </title><script>alert(1)</script>"))
    assert "<title>a &lt;/title&gt;&lt;script&gt;" in page


def test_strings_of_a_frame_are_inert_and_nan_stays(tmp_path):
    frame = pd.DataFrame({"kernel": ["<img src=x onerror=alert(1)>", "b"], "time_us": [1.5, None]})
    page = rendered(tmp_path, code("frame", outputs=[shows("text/html", frame._repr_html_())]))
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<td>NaN</td>" in page
    assert re.search(r'<div class="table-box" tabindex="0"><table[^>]*class="dataframe"', page)


def test_figures_carry_alt_text_of_their_metadata_or_heading(tmp_path):
    page = rendered(
        tmp_path,
        new_markdown_cell("# Title\n\n## LDS against `tflops`"),
        code("a", outputs=[shows("image/png", PNG, **{"image/png": {"alt": 'a "quoted" <text>'}})]),
        code("b", outputs=[shows("image/png", PNG)]),
        code("c", outputs=[shows("image/svg+xml", SVG)]),
    )
    images = re.findall(r"<img[^>]*>", page)
    assert len(images) == 3
    assert "quoted" in images[0] and "&lt;text&gt;" in images[0]
    assert 'alt="Figure: LDS against tflops"' in images[1]
    assert 'alt="Figure: LDS against tflops"' in images[2]
    assert 'src="data:image/svg+xml;base64,' in images[2]


def test_repeated_headings_have_ids_of_their_own(tmp_path):
    page = rendered(tmp_path, new_markdown_cell("# A\n\n## B & C\n\n## B & C\n\n```\n# no\n```"))
    place = re.search(r'<ol class="toc-list">.*?</ol>', page)[0]
    assert re.findall(r'href="#([^"]+)"', place) == ["a", "b-c", "b-c-2"]
    assert page.count('id="b-c-2"') == 1


def test_default_parameters_are_shown_when_none_was_given(tmp_path):
    page = rendered(tmp_path, code(DEFAULTS, "parameters"))
    assert "all defaults" in page
    assert "pipeline depths" in body(page)


def test_widgets_and_scripts_of_jupyter_fall_back_to_text(tmp_path):
    output = shows("application/vnd.jupyter.widget-view+json", {"model_id": "1"})
    output.data["text/plain"] = "IntSlider(value=1)"
    script = shows("application/javascript", "fetch('https://a.example')")
    script.data["text/plain"] = "<Javascript>"
    page = rendered(tmp_path, code("w", outputs=[output, script]))
    assert "IntSlider(value=1)" in page
    assert "a.example" not in page


def page_in_browser(path, folder):
    process = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process.stdout


# Runs inside the page, where it stands before the policy: what was requested or refused, then
# what sorting and filtering leave.
PROBE = """<script>
const refused = [];
addEventListener("securitypolicyviolation", (e) => refused.push(e.blockedURI));
addEventListener("error", (e) => e.message && refused.push(e.message));
addEventListener("load", () => {
  const column = (table) => [...table.tBodies[0].rows].filter((row) => !row.hidden)
    .map((row) => row.cells[2].textContent);
  const table = document.querySelector("table.dataframe");
  const sort = table?.querySelectorAll("button.sort")[1];
  sort?.click(); const up = table && column(table);
  sort?.click(); const down = table && column(table);
  const input = document.querySelector(".filter input");
  if (input) { input.value = "kernel_7"; input.dispatchEvent(new Event("input")); }
  const requests = performance.getEntriesByType("resource").map((e) => e.name)
    .filter((name) => !name.startsWith("data:"));
  const result = document.createElement("script");
  result.type = "application/json"; result.id = "probe";
  result.textContent = JSON.stringify({ requests, refused, up, down,
    filtered: table && column(table), inputs: document.querySelectorAll(".filter").length,
    wide: document.documentElement.scrollWidth > innerWidth });
  document.body.append(result);
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_page_works_in_a_browser_without_a_request(tmp_path):
    values = [3.5, 1200.25, None, 20.0, *range(100, 116)]
    frame = pd.DataFrame({"kernel": [f"kernel_{i}" for i in range(20)], "time_us": values})
    frame = frame.assign(**{f"column_number_{i}": "value" for i in range(18)})
    page = rendered(
        tmp_path,
        new_markdown_cell("# Title\n\n## Rows\n\n[a link](https://a.example/)"),
        code("frame", outputs=[shows("text/html", frame._repr_html_())]),
        code("small", outputs=[shows("text/html", frame.head(3)._repr_html_())]),
        code("figure", outputs=[shows("image/png", PNG)]),
    )

    def probe(name, text):
        path = tmp_path / name
        path.write_text(text)
        dom = page_in_browser(path, tmp_path / "profile")
        return json.loads(
            re.search(r'<script type="application/json" id="probe">(.*?)</script>', dom)[1]
        )

    def probed(page):
        return re.sub(r"<meta charset[^>]*>", lambda found: found[0] + PROBE, page, count=1)

    seen = probe("page.html", probed(page))
    assert (seen["requests"], seen["refused"]) == ([], [])
    ordered = sorted(v for v in values if v is not None)
    assert [float(v) for v in seen["up"]][:-1] == ordered and seen["up"][-1] == "NaN"
    assert [float(v) for v in seen["down"]][:-1] == ordered[::-1] and seen["down"][-1] == "NaN"
    assert seen["filtered"] == ["103.00"]
    assert seen["inputs"] == 1
    assert not seen["wide"], "a wide table scrolls in its own box"

    # The same count sees a request where there is one.
    control = re.sub(r"<meta[^>]*Content-Security-Policy[^>]*>", "", page)
    control = control.replace("</main>", '<img alt="" src="http://a.example/x.png"></main>')
    assert probe("control.html", probed(control))["requests"] == ["http://a.example/x.png"]

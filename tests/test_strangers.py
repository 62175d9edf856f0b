"""What others wrote is text: it runs nothing, asks for nothing and commands nothing, anywhere.

Rows as they are shipped, with hostile texts in every column that is shown, go through every
output: terminal, CI log, JSON, Markdown, pictures, pages in a browser. Files that are no rows,
names that are no names and parameters that are none are refused, in bounded memory.
"""

import ast
import http.server
import json
import pickle
import re
import resource
import subprocess
import sys
import threading
import unicodedata
import warnings
import xml.etree.ElementTree
from pathlib import Path

import nbformat
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bs4 import BeautifulSoup
from click.testing import CliRunner
from nbconvert.filters import markdown2html
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_report import CHROMIUM

from moelab import (
    cliffs,
    health,
    inert,
    launches,
    lds_map,
    measurements,
    parameters,
    plots,
    records,
    regress,
    regression_report,
    report,
    standings,
    tables,
    trade,
    upgrade,
)
from moelab.cli import app

PACKAGE = Path(records.__file__).parent
RAN = "document.documentElement.dataset.ran=1"


def names(url="http://a.example/"):
    """Texts that would do something somewhere, by what they would do it to."""
    return {
        "image": f'<img src="{url}image" onerror="{RAN}">',
        "script": f"</script><script>{RAN}</script>",
        "svg": f"<svg onload={RAN}><use href='{url}use#x'></svg>",
        "style": f"</style><style>@import url({url}style)</style>",
        "attribute": f'" onmouseover="{RAN}" onload="{RAN}" \' x="',
        "comment": f"--><iframe src={url}frame srcdoc='<script>{RAN}</script>'></iframe>",
        "link": f"[x](javascript:{RAN}) **[y]({url}y)**",
        "autolink": f"{url} www.a.example <{url}> me@a.example",
        "picture": f"![x]({url}picture)",
        "reference": f"[x]: {url}reference\n\n[x]",
        "heading": "a\n\n# title\n\n- item\n\n    code",
        "table": "a|b`c`\n|---|---|\n|d|e|",
        "formula": "$\\frac{",
        "power": "$x^{$ $$",
        "colour": "\x1b[31mred\x1b]8;;http://a.example\x07x\x1b]52;c;YQ==\x07\r",
        "control": "\x9b31m\x85\x90\x7f\x08",
        "direction": "\u202ecod.exe\u2066\u200f\u2028",
        "nothing": "a\x00b",
        "github": "x\n::error::boom\n  ::add-mask::x\n\x0b::set-output name=a::b",
        "azure": "##vso[task.setvariable variable=a]b ##[error]c ###[group]",
        "spreadsheet": "=cmd|'/c calc'!A1",
        "plus": "+1+1",
        "minus": "-1-1",
        "at": "@SUM(1)",
        "tab": "\t=1",
        "long": "x" * 10_000,
        "braces": "{{ 7*7 }}{% raw %}{0.__class__}",
        "path": "../../etc/passwd",
        "quotes": "\"'`\\",
    }


# One of each kind, and every other in the long form; the pages in a browser have all of them.
_FIRST = ("image", "table", "formula", "colour", "github")
every_name = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=what, marks=() if what in _FIRST else pytest.mark.slow)
        for what, name in names().items()
    ],
)

# What rows say in words; the others say it in words that are checked: `status`, `mode`.
SHOWN = (
    *("kernel", "model", "gpu", "workload", "run", "reason", "triton", "moelab", "method"),
    *("occupancy_limit", "throttled", "y_format", "compile_key"),
)
OF_JSON = ("args", "options", "buffers", "samples_us", "made_by")
SPELLED = ("x_format", "scale_layout", "peer", "includes", "side", "target", "status", "mode")


def test_every_text_of_a_row_is_hostile_here_or_said_to_be_something_else():
    texts = {name for name, kind in records.COLUMNS.items() if kind == "string"}
    assert {*SHOWN, *OF_JSON, *SPELLED} == texts


def hostile(rows, name):
    said = json.dumps({name: name, "driver": name, "date": name, "torch": name})
    return rows.assign(**dict.fromkeys(SHOWN, name), made_by=said)


@pytest.fixture(scope="module")
def swept():
    """Every stage count and two token counts of one measured problem, and its neighbour."""
    rows = records.read(trade.SHIPPED)
    here = (rows["kernel"] == "moe_gemm_a8w8") & (rows["layer"] == 1) & (rows["tp"] == 1)
    return rows[here & (rows["model"] == "Qwen3-235B-A22B")].head(40)


@pytest.fixture(scope="module")
def timed(swept):
    """Measured rows and peers of two cells."""
    rows = records.read(standings.SHIPPED)
    here = (rows["kernel"] == "moe_gemm_a8w8") & (rows["layer"] == 1) & (rows["m"] <= 2560)
    return rows[here & (rows["model"] == "Qwen3-235B-A22B")]


def of_peers(rows, name):
    rows = hostile(rows, name).assign(run=rows["run"], y_format=rows["y_format"])
    peer = rows["peer"].where(rows["peer"].isna(), name + rows["peer"].fillna(""))
    failed = rows["peer"].notna() & (rows.index % 5 == 0)
    return rows.assign(
        peer=peer, time_us=rows["time_us"].mask(failed), tflops=rows["tflops"].mask(failed)
    )


def commands(said):
    """Find what a terminal or a CI job would obey in what was printed."""
    controls = {c for c in said if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    lines = [line for line in said.split("\n") if line.lstrip().startswith("::")]
    return [*(controls - {"\n", "\t"}), *lines, *re.findall(r"##(?:vso)?\[", said)]


def test_a_command_is_found_where_there_is_one():
    for name in ("colour", "control", "direction", "nothing", "github", "azure"):
        assert commands(names()[name])


def runs(*arguments):
    """Run a command of moelab here; warnings go where they would."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result, result.output + "\n".join(str(each.message) for each in warned)


# Terminals and logs.


@every_name
def test_commands_that_read_rows_print_no_command(tmp_path, swept, name):
    base, candidate = tmp_path / "base.parquet", tmp_path / "candidate.parquet"
    rows = hostile(swept.head(8), name)
    records.export(rows, base)
    records.export(rows.assign(lds_bytes=rows["lds_bytes"] + 1, made_by="{}").head(6), candidate)
    summary = tmp_path / "summary.md"
    (compared, said), (as_json, spelled) = (
        runs("compare", base, candidate, "--markdown", summary),
        runs("compare", base, candidate, "--json"),
    )
    assert compared.exit_code in (0, 1, 3) and as_json.exit_code == compared.exit_code
    assert commands(said) == commands(spelled) == commands(summary.read_text()) == []
    assert json.loads(spelled)["cells"][0]["kernel"] == name
    for refused in (
        ("export", "--format", "vllm", "--target", "sm_90", "--rows", base, "--out", tmp_path),
        ("tune", "--rows", tmp_path / "nothing" / name.replace("\0", "")[:60], "--out", "x.json"),
        ("compare", f"{base}@kernel=another", candidate),
    ):
        result, said = runs(*refused)
        assert result.exit_code in (1, 2) and commands(said) == []


@every_name
def test_a_damaged_row_is_refused_and_its_words_command_nothing(tmp_path, name):
    store = tmp_path / "store"
    row = {"kernel": name, "status": name, "mode": name, "schema": 6, "m": name}
    with records.Journal(store) as journal:
        journal.append(row)
    path = records.export(records.frame([]), tmp_path / "rows.parquet")
    for source in (store, tmp_path / "nothing.parquet"):
        result, said = runs("compare", source, path)
        assert result.exit_code == 2 and commands(said) == []
    result, said = runs("export", "--format", "vllm", "--target", "sm_90", "--rows", store)
    assert result.exit_code == 2 and commands(said) == []


@every_name
def test_a_launch_of_hostile_names_is_refused_and_commands_nothing(tmp_path, name):
    launch = tmp_path / "launch.json"
    for given in (
        {"args": {name: name}},
        {"args": {name: {"const": name}}, name: 1},
        {"args": {}, "options": {name: name}},
        {"args": {"x": {name: name}}},
    ):
        launch.write_text(json.dumps(given))
        kernel = f"{PACKAGE / 'kernels' / 'epilogue.py'}:{name.replace(chr(0), '')[:99]}"
        result, said = runs("lds", kernel, launch, "--target", "gfx950", "--store", tmp_path)
        assert result.exit_code == 2 and commands(said) == []


def test_json_says_the_same_and_no_log_obeys_it():
    for name in names().values():
        text = pd.DataFrame({"kernel": [name], "n": [1]}).to_json(orient="records", lines=True)
        assert json.loads(inert.json(text))["kernel"] == name
        assert commands(inert.json(text)) == []


@every_name
def test_tallies_and_verdicts_of_rows_are_lines_of_their_own(timed, name):
    rows = of_peers(timed, name)
    said = measurements.tally(rows)
    assert len(said.split("\n")) == len(
        measurements.tally(timed.assign(time_us=rows["time_us"])).split("\n")
    )
    assert commands(inert.printed(said)) == []


# Nothing writes CSV, whose cells a spreadsheet may run.


def test_no_output_is_csv():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"to_csv|csv\.writer|to_excel", path.read_text()), path


# Markdown.


def sentences(swept, timed, name):
    rows = tables.labelled(hostile(swept, name))
    peers = tables.labelled(of_peers(timed, name))
    cells = standings.cells(peers).assign(**{standings.ALL_INSIDE: 0.5, standings.REASON: name})
    two = tables.labelled(
        pd.concat(
            [
                hostile(swept, name),
                hostile(swept, name).assign(
                    triton="other", lds_bytes=swept["lds_bytes"] * 9, status="out_of_lds"
                ),
            ]
        )
    )
    fastest = cliffs.cells(trade.fastest(rows), "tflops", trade.CURVE)
    steps = cliffs.steps(fastest, trade.CURVE).dropna(subset=[cliffs.CHANGE])
    steps = steps.assign(**{cliffs.LOOK: True, cliffs.CHANGE: -9.0})
    buffers = [[name, "local_alloc", name, [8], name, 2, 0, 0, 64, 0, 5]]
    mapped = json.dumps({"positions": 9, "missing": None, "buffers": buffers})
    return {
        "tables": tables.conclusion(rows.assign(status="crashed")),
        "trade": trade.conclusion(rows, trade.stages(rows)),
        "losses": standings.losses(cells),
        "standings": standings.conclusion(peers, cells),
        "made by": measurements.made_by(rows),
        "upgrade": upgrade.conclusion(upgrade.pairs(two)),
        "cliffs": cliffs.conclusion(steps, cliffs.quicker(fastest, trade.CURVE), trade.CURVE),
        "map": lds_map.tell(rows.head(1).assign(buffers=mapped))[0].markdown,
    }


OURS = {"ul", "li", "strong", "p", "code", "em", "span", "div"}


@every_name
def test_sentences_of_rows_are_ours_when_they_are_rendered(swept, timed, name):
    usual = sentences(swept, timed, "plain")
    for what, said in sentences(swept, timed, name).items():
        page = BeautifulSoup(markdown2html(said), "html.parser")
        found = {tag.name for tag in page.find_all()}
        assert found <= OURS, (what, found - OURS, said[:300])
        assert commands(said) == [], what
        # As many items as with a name that does nothing.
        plain = BeautifulSoup(markdown2html(usual[what]), "html.parser")
        assert len(page.find_all("li")) == len(plain.find_all("li")), what


@every_name
def test_a_summary_for_github_is_ours_when_it_is_rendered(swept, name):
    import mistune

    rows = hostile(swept.head(6), name)
    was = rows.assign(status="out_of_lds", reason=name)
    told = regress.compare(rows, was.iloc[1:].assign(made_by="{}"))
    render = mistune.create_markdown(plugins=["table", "url", "strikethrough"], escape=False)
    found = BeautifulSoup(render(regress.markdown(told)), "html.parser").find_all()
    tags = {tag.name for tag in found}
    assert tags <= {
        "h2",
        "ul",
        "li",
        "code",
        "details",
        "summary",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "p",
        "strong",
    }
    assert [tag.name for tag in found].count("h2") == 1


def test_text_that_does_nothing_is_left_as_it_is():
    for text in ("moe_gemm_a8w8", "Qwen3-235B-A22B", "128x256x128+tma/2", "3.9.0+git1", "a, b"):
        assert inert.line(text) == inert.markdown(text) == inert.printed(text) == text
    assert inert.line("Größe 你好") == "Größe 你好"


def test_two_long_names_stay_two():
    assert inert.line("x" * 999 + "a") != inert.line("x" * 999 + "b")


# Pictures.


@every_name
def test_pictures_draw_names_as_text(tmp_path, swept, timed, name):
    rows, peers = (tables.labelled(of) for of in (hostile(swept, name), of_peers(timed, name)))
    fastest = cliffs.cells(trade.fastest(rows), "tflops", trade.CURVE)
    steps = cliffs.steps(fastest, trade.CURVE)
    here = rows[rows["m"] == rows["m"].iloc[0]]
    for number, figure in enumerate(
        (
            plots.lds_against_limit(here.assign(target=name)),
            plots.lds_against_throughput(here),
            plots.further_stages(trade.further(here)),
            plots.cliffs_along_m(steps, trade.CURVE),
            plots.left_along_m(steps, trade.CURVE),
            plots.ours_and_peers(peers),
        )
    ):
        path = tmp_path / f"{number}.svg"
        with warnings.catch_warnings():
            # Of letters that the font lacks.
            warnings.simplefilter("ignore", UserWarning)
            figure.savefig(path, dpi=40)
        # Well-formed, and no wider than a page.
        assert float(xml.etree.ElementTree.parse(path).getroot().get("width")[:-2]) < 1000


# Pages, in a browser.


class Listener(http.server.ThreadingHTTPServer):
    """Counts who connects."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def process_request(self, request, address):
        self.asked.append(request.recv(200)[:60])
        self.shutdown_request(request)


@pytest.fixture
def listener():
    with Listener() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def in_a_browser(path, folder):
    """Give the DOM of a page after two seconds."""
    process = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--no-proxy-server", f"--user-data-dir={folder}", "--timeout=2000", "--dump-dom"),
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return process.stdout


def shows(mime, data):
    return new_output("display_data", data={mime: data})


def notebook_of(folder, outputs):
    cells = [new_markdown_cell("# A report")]
    cells += [new_code_cell("shown", outputs=[output]) for output in outputs]
    path = folder / "cells.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return report.to_html(path, folder / "cells.html")


def frames(swept, timed, name):
    rows, peers = (tables.labelled(of) for of in (hostile(swept, name), of_peers(timed, name)))
    told = regress.compare(rows.head(6), rows.head(6).assign(status="out_of_lds", made_by="{}"))
    case = regression_report.Case(name, name, name)
    yield from (
        tables.shown(of)
        for of in (
            rows[["kernel", "model", "reason", "gpu", "m"]].rename(columns={"gpu": name}),
            tables.statuses(rows),
            health.provenance(rows),
            trade.configurations(trade.front(rows)),
            trade.gains(trade.further(rows)),
            standings.shown(standings.cells(peers)),
            standings.left_out(peers),
            standings.versions(peers),
            regression_report.moved(told),
            regression_report.fits(told),
            regression_report.provenance(told),
        )
    )
    yield regression_report.headline(told, case)
    yield regression_report.conclusion(told)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(
    "part",
    [slice(12), pytest.param(slice(12, None), marks=pytest.mark.slow)],
    ids=["what HTML and Markdown obey", "what others do"],
)
def test_no_name_runs_or_asks_for_anything_in_a_page(tmp_path, swept, timed, listener, part):
    outputs = []
    every = [name for name in names(listener.url).values() if len(name) < 200]
    for name in every:
        outputs.append(new_output("stream", name="stderr", text=name))
        outputs.append(new_output("error", ename=name, evalue=name, traceback=[name]))
    # Three in each text, so that none is cut off.
    every = every[part]
    for name in (" ".join(every[at : at + 3]) for at in range(0, len(every), 3)):
        outputs += [shows("text/html", each.data) for each in frames(swept, timed, name)]
        said = sentences(swept, timed, name)
        outputs += [shows("text/markdown", each) for each in said.values()]
    path = notebook_of(tmp_path, outputs)
    page = path.read_text()
    assert not inert._NO_PAGE.search(page)
    # As it would be without a policy, too: that is the second line of defence.
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<meta[^>]*Content-Security-Policy[^>]*>", "", page))
    for each in (path, bare):
        dom = in_a_browser(each, tmp_path / "profile")
        assert "A report" in dom and "data-ran" not in dom
    assert listener.asked == []
    tags = {tag.name for tag in BeautifulSoup(page, "html.parser").select("main *")}
    assert not tags & {"iframe", "object", "embed", "form", "base", "link", "meta", "img", "script"}


CHANNELS = {
    "img": "<img src='{url}img'>",
    "srcset": "<picture><source srcset='{url}srcset'><img></picture>",
    "script": "<script src='{url}script'></script>",
    "inline": "<script>document.documentElement.dataset.ran=1; fetch('{url}fetch')</script>",
    "handler": "<img src=data:x onerror='document.documentElement.dataset.ran=1'>",
    "style": "<style>@import url({url}import); body {{ background: url({url}css) }}</style>",
    "font": "<style>@font-face {{ font-family: f; src: url({url}font) }} "
    "main {{ font-family: f }}</style><p>font</p>",
    "frame": "<iframe src='{url}iframe'></iframe>",
    "object": "<object data='{url}object'></object><embed src='{url}embed'>",
    "media": "<video src='{url}video' poster='{url}poster' autoplay></video>",
    "form": "<form action='{url}form'><input type=image src='{url}input'></form>"
    "<script>document.forms[0].submit()</script>",
    "link": "<link rel=stylesheet href='{url}sheet'><link rel=prefetch href='{url}prefetch'>"
    "<link rel=preload as=image href='{url}preload'><link rel=icon href='{url}icon'>",
    "preconnect": "<link rel=preconnect href='{url}'>",
    "refresh": "<meta http-equiv=refresh content='0;url={url}refresh'>",
    "svg": "<svg><use href='{url}use#a'/><image href='{url}image'/></svg>",
    "module": "<script type=module>import '{url}module'</script>",
}


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_no_request_leaves_a_page_by_any_way(tmp_path, listener):
    outputs = [shows("text/html", each.format(url=listener.url)) for each in CHANNELS.values()]
    path = notebook_of(tmp_path, outputs)
    dom = in_a_browser(path, tmp_path / "profile")
    assert "A report" in dom and "data-ran" not in dom
    assert listener.asked == []
    assert not BeautifulSoup(path.read_text(), "html.parser").select("main meta")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
# What prints the DOM follows no refresh: that a page has none is looked at above.
@pytest.mark.parametrize("channel", sorted(CHANNELS.keys() - {"refresh"}))
def test_each_way_is_one_where_there_is_no_policy(tmp_path, listener, channel):
    path = tmp_path / "page.html"
    path.write_text(f"<main>{CHANNELS[channel].format(url=listener.url)}</main>")
    dom = in_a_browser(path, tmp_path / "profile")
    assert listener.asked or "data-ran" in dom


@pytest.fixture
def strangers_rows(tmp_path, swept, timed, listener):
    """Exports with every name of `names` in each column, in turn."""
    every = list(names(listener.url).values())
    every.remove("x" * 10_000)
    joined = " ".join(each[:40] for each in every)
    sweep_rows, peer_rows = hostile(swept, joined), of_peers(timed, joined)
    return (
        records.export(sweep_rows, tmp_path / "sweep.parquet"),
        records.export(peer_rows, tmp_path / "peers.parquet"),
        records.export(sweep_rows.assign(lds_bytes=9), tmp_path / "other.parquet"),
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_whole_reports_of_strangers_rows_run_nothing(tmp_path, strangers_rows, listener):
    swept, timed, other = strangers_rows
    m = int(records.read(swept)["m"].iloc[0])
    for notebook, given in (
        ("02_lds_vs_throughput", {"rows_path": swept, "m": m}),
        ("05_kernels_and_peers", {"rows_path": timed}),
        ("06_regression_report", {"baseline": swept, "candidate": other, "title": "<b>`$"}),
    ):
        page = report.render(notebook, given, tmp_path / "reports", progress=False)
        dom = in_a_browser(page, tmp_path / "profile")
        assert "moelab report" in dom and "data-ran" not in dom
        assert not inert._NO_PAGE.search(page.read_text())
    assert listener.asked == []


# Files that are no rows.

MiB = 1 << 20


def bomb(path, rows):
    """A small Parquet file whose one text stands in every row."""
    text = "x" * 100_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    table = pa.table({name: column for name in ("kernel", "status", "reason")})
    pq.write_table(table, path, compression="zstd")


def wrong_files(folder):
    (folder / "pickle.parquet").write_bytes(pickle.dumps({"run": Path.home}))
    (folder / "empty.parquet").write_bytes(b"")
    pq.write_table(pa.table({"status": [1.5], "schema": ["a"]}), folder / "types.parquet")
    nested = pa.array([[{"a": [1]}]])
    pq.write_table(pa.table({"status": nested, "schema": nested}), folder / "nested.parquet")
    bomb(folder / "bomb.parquet", 1_000_000)
    assert (folder / "bomb.parquet").stat().st_size < MiB
    with (folder / "sparse.parquet").open("wb") as file:
        file.truncate(10 << 30)
    for store, line in {
        "long": b'{"kernel": "' + 100 * MiB * b"x" + b'"}\n',
        "deep": 100_000 * b"[" + b"\n",
        "deep row": b'{"status": "ok", "schema": 1, "made_by": "' + 99_999 * b"[" + b'"}\n',
        "binary": bytes(range(256)) * 99,
    }.items():
        (folder / store).mkdir()
        (folder / store / "rows-1.jsonl").write_bytes(line)
    return sorted(folder.iterdir())


# Of a whole process with pandas and pyarrow, most of it code and threads' stacks.
MEMORY = 4 << 30


def bounded(*arguments):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    command = [sys.executable, "-m", "moelab.cli_main", *map(str, arguments)]
    command[1:3] = ["-c", "from moelab.cli import app; app()"]
    return subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=120)


def test_what_is_no_file_of_rows_is_refused_in_bounded_memory(tmp_path):
    kept = records.export(records.frame([]), tmp_path / "rows.parquet")
    (tmp_path / "wrong").mkdir()
    for path in wrong_files(tmp_path / "wrong"):
        result, said = runs("compare", path, kept)
        assert result.exit_code == 2 and str(path.name) in said, (path, said)
        assert len(said) < 3000 and "Traceback" not in said


@pytest.mark.slow
def test_a_bomb_takes_no_more_memory_than_rows_do(tmp_path):
    kept = records.export(records.frame([]), tmp_path / "rows.parquet")
    (tmp_path / "wrong").mkdir()
    for path in wrong_files(tmp_path / "wrong"):
        ended = bounded("compare", path, kept)
        assert (ended.returncode, ended.stdout) == (2, ""), (path, ended.stderr[-500:])
        assert "Error" in ended.stderr and "Traceback" not in ended.stderr


def test_measurements_that_are_none_are_refused(tmp_path):
    files = {
        "nul.csv": b"kernel,target\0\n\0,1\n",
        "binary.csv": bytes(range(256)),
        "pickle.parquet": pickle.dumps([1]),
        "other.xlsx": b"PK",
        "types.csv": b"kernel,target,tile,num_warps,num_stages,m,n,k,time_us\na,b,c,d,e,f,g,h,i\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        result, said = runs(
            *("advise", "--kernel", "moe_gemm_a8w8", "--target", "gfx950"),
            *("--measured", tmp_path / name, "--store", tmp_path / "rows"),
        )
        assert result.exit_code == 2 and name in said and commands(said) == [], said


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"args": ' * 100_000,
        '{"args": {"x": "' + "x" * (2 << 20) + '"}}',
        '{"args": {"x": ' + "9" * 10_000 + "}}",
        '{"args": {"\\ud800": {"const": "\\udfff"}}}',
        "\0",
        "",
        "null",
    ],
    ids=["nested", "objects", "large", "number", "surrogate", "nul", "empty", "null"],
)
def test_a_launch_that_is_none_is_refused_with_one_that_is(tmp_path, text):
    path = tmp_path / "launch.json"
    path.write_text(text)
    with pytest.raises(launches.LaunchError, match=re.escape(str(path))) as refused:
        launches.read(path)
    assert len(str(refused.value)) < 1000


def test_only_what_moelab_sent_itself_is_unpickled():
    readers = {"read_pickle", "eval", "exec", "Unpickler"}
    modules = {"pickle", "torch", "yaml", "marshal", "shelve", "joblib"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                whose, _, what = ast.unparse(node.func).rpartition(".")
                if what in readers or (whose in modules and what in ("load", "loads", "open")):
                    found.add(f"{whose}.{what}")
    # A sweep's own request to the process of another Triton, and to the workers of a cluster.
    assert found == {"pickle.load", "pickle.loads"}


# Names of files and parameters.


@pytest.mark.parametrize(
    "name",
    [
        *("..", "../x", "a/../../x", "/etc/x", "~", "~/x", "a/b", "a\\b", ".hidden", "-x", "a..b"),
        *("..%2fx", "x%2e", "x\u2215y", "x\uff0fy", "\u2024\u2024/x", "x.", "x ", "x\n", "x\0y"),
        *("a" * 65, "x\u202ey", "$(x)", "x;y", "x|y", "ü"),
    ],
)
def test_a_reports_name_leads_nowhere_else(tmp_path, name):
    with pytest.raises(parameters.ParameterError, match="no name of a report's files"):
        report.render("01_stage_sweep", {}, tmp_path / "reports", name=name)
    assert not (tmp_path / "reports").exists()
    result, said = runs("report", "01_stage_sweep", "--out", tmp_path, f"--name={name}")
    assert result.exit_code == 2 and commands(said) == []


@pytest.mark.parametrize(
    "name",
    [
        *(
            "__import__",
            "x",
            "os",
            "a=1\nimport os",
            "a; import os",
            "stages ",
            " stages",
            "Stages",
        ),
        *("stages\n", "stages=1", "1", "\u017ftages", "s\u200btages", "__builtins__", "In", "a.b"),
    ],
)
def test_a_parameter_that_a_notebook_lacks_runs_nothing(tmp_path, name):
    result, said = runs("report", "01_stage_sweep", "--out", tmp_path, "-p", name, "1")
    assert result.exit_code == 2 and "is not a parameter" in said and commands(said) == []
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_rows_name_is_no_path(tmp_path, swept, monkeypatch):
    monkeypatch.setenv("MOELAB_TUNED", str(tmp_path / "tuned"))
    rows = records.export(swept.assign(target="../../evil"), tmp_path / "rows.parquet")
    result, said = runs("tune", "--rows", rows)
    assert result.exit_code != 0 and "evil" in said
    assert sorted(tmp_path.iterdir()) == [rows]


@pytest.mark.parametrize(
    "name", ["two words", "Größe 你好", 'it\'s "quoted"', "a@b=c", "-x", "{0}"]
)
def test_folders_of_any_name_are_compared_exported_and_tuned(tmp_path, swept, name):
    folder = tmp_path / name
    folder.mkdir()
    rows = records.export(swept, folder / f"{name}.parquet")
    result, said = runs("compare", rows, rows, "--markdown", folder / "summary.md")
    assert result.exit_code in (0, 3) and (folder / "summary.md").exists(), said
    result, said = runs("tune", "--rows", rows, "--out", folder / "tuned.json")
    assert result.exit_code == 0 and (folder / "tuned.json").exists(), said


def test_code_that_runs_is_named_and_rows_are_none(tmp_path):
    for command in ("lds", "capture"):
        _, said = runs(command, "--help")
        assert "that you would not run" in " ".join(said.split())
    path = tmp_path / "kernel.py"
    path.write_text("x = 1\n")
    (tmp_path / "launch.json").write_text('{"args": {}}')
    _, said = runs("lds", f"{path}:x", tmp_path / "launch.json", "--target", "gfx950")
    assert f"moelab runs {path}" in said

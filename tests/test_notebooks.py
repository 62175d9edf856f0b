"""Notebooks as they are committed, and one small run from the first cell to the page."""

import ast
import fcntl
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moelab import (
    baselines,
    cliffs,
    compiler,
    estimates,
    lds_map,
    parameters,
    peers,
    plan,
    problems,
    published,
    records,
    regress,
    regression_report,
    report,
    standings,
    tables,
    toolchain,
    trade,
    upgrade,
)
from moelab.parameters import ParameterError
from moelab.report import ReportError
from moelab.targets import TARGETS

FOLDER = Path(report.__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SWEEP = FOLDER / "01_stage_sweep.ipynb"

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    found = json.loads(path.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def guard(path):
    """The names that a notebook's guard allows: the second argument of `given`."""
    for cell in cells(path):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("given"):
                return eval(ast.unparse(node.args[1]), {"plan": plan, "trade": trade})
    return None


# As committed.


def test_the_stage_sweep_is_there():
    assert SWEEP in NOTEBOOKS


@every
def test_a_notebook_is_committed_without_outputs(path):
    for cell in cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert "papermill" not in cell["metadata"]


@every
def test_the_parameters_are_those_that_the_guard_allows(path):
    assert list(guard(path)) != []
    assert set(parameters.parameters_of(path)) == set(guard(path))


@every
def test_every_parameter_is_a_typed_literal_with_a_line_of_help(path):
    (cell,) = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert cell == cells(path)[0], "papermill injects after this cell; the guard comes next"
    for parameter in parameters.parameters_of(path).values():
        assert parameter.help, parameter.name
        assert type(ast.literal_eval(parameter.default)).__name__ == parameter.type


def test_the_stage_sweep_takes_a_grid_a_store_and_jobs():
    assert set(guard(SWEEP)) == {*plan.PARAMETERS, "store", "jobs"}


def test_the_stage_sweeps_defaults_are_a_valid_grid():
    defaults = parameters.parameters_of(SWEEP)
    given = {name: ast.literal_eval(defaults[name].default) for name in plan.PARAMETERS}
    # 8 pairs of MoE GEMM and model with 2 layers each, and 2 shared experts with 1; then
    # 16 token counts x 2 stage counts x 2 settings of async copy.
    assert len(plan.grid(**given)) == (8 * 2 + 2) * 16 * 2 * 2


@every
def test_a_cell_holds_no_logic(path):
    logic = (
        *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
        *(ast.If, ast.IfExp, ast.For, ast.While, ast.Try),
    )
    for cell in cells(path):
        found = [node for node in ast.walk(ast.parse(source(cell))) if isinstance(node, logic)]
        assert found == [], source(cell)


@every
def test_a_notebook_asks_a_question_and_ends_with_conclusion_and_provenance(path):
    headings = [
        line
        for cell in cells(path, "markdown")
        for line in source(cell).splitlines()
        if line.startswith("#")
    ]
    assert headings[0].startswith("# ") and headings[0].endswith("?")
    assert [heading for heading in headings if heading.startswith("# ")] == headings[:1]
    assert headings[-2:] == ["## Conclusion", "## Provenance"]


# As run.

SMALL = {
    "kernels": "moe_gemm_a8w8",
    "models": "Llama4 Maverick",
    "m": 512,
    "tp": 8,
    "layers": 1,
    "stages": "1,2",
    "targets": "gfx950",
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The stage sweep, over 4 configurations and aiter's tests; once for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    page = folder / "out" / "01_stage_sweep.html"
    with (folder / "rendering").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not page.exists():
            given = SMALL | {"store": str(folder / "rows")}
            assert report.render("01_stage_sweep", given, page.parent, progress=False) == page
    return folder, page


def test_the_page_has_every_section(rendered):
    _, path = rendered
    page = path.read_text()
    headings = [re.sub(r"<[^>]+>", "", text) for text in re.findall(r"<h[12][^>]*>.*?</h", page)]
    shown = " ".join(headings)
    for cell in cells(SWEEP, "markdown"):
        title = source(cell).splitlines()[0].lstrip("# ")
        assert title in shown
    assert page.count("<img") == 3
    assert "Traceback" not in page


def test_the_page_holds_what_the_rows_say(rendered):
    folder, path = rendered
    page = path.read_text()
    rows = records.read(folder / "rows")
    asked = rows[(rows["model"] == "Llama4 Maverick") & (rows["mode"] == "lds")]
    assert len(asked) == 4
    for lds_bytes in asked["lds_bytes"]:
        assert f"{lds_bytes:,}" in page
    for sentence in tables.conclusion(asked).splitlines():
        words = re.sub(r"^- |\*\*", "", sentence)
        assert words in re.sub(r"<[^>]+>", "", page)


def test_the_page_tells_which_buffer_takes_most_with_async_copy_off_and_on(rendered):
    folder, path = rendered
    rows = records.read(folder / "rows")
    told = lds_map.tell(rows[rows["mode"] == "map"])
    assert {each.lds_bytes for each in told} >= {rows["lds_bytes"][rows["mode"] == "map"].max()}
    assert len(told) == 2
    for each in told:
        assert each.sentence in path.read_text()


def test_the_page_tells_of_each_of_aiters_tests_under_every_policy(rendered):
    folder, path = rendered
    page = path.read_text()
    rows = records.read(folder / "rows")
    assert len(rows[rows["model"].str.startswith("test_")]) == len(plan.aiter_tests())
    found = tables.aiter_tests(rows)
    assert list(found["test"]) == [test.name for test in problems.AITER_TESTS]
    for row in found.itertuples(index=False):
        for cell in row:
            assert f"<td>{cell}</td>" in page
    assert "not compiled here" not in page


def test_async_copy_broke_the_tests_that_each_fix_mended_and_not_blockscale(rendered):
    if not compiler.triton_version().startswith(("3.8.", "3.9.")):
        pytest.skip(f"figures of Triton 3.8 and 3.9, not {compiler.triton_version()}")
    folder, _ = rendered
    found = tables.aiter_tests(records.read(folder / "rows")).set_index("test")
    verdicts = {test: [cell.split()[0] for cell in found.loc[test]][:4] for test in found.index}
    assert verdicts == {
        # Before #2723 with async copy off and on, after it, after #3372.
        "test_moe_gemm_a4w4": ["passes", "FAILS", "passes", "passes"],
        "test_moe_gemm_a8w4": ["passes", "FAILS", "passes", "passes"],
        "test_moe_gemm_a8w8": ["passes", "FAILS", "passes", "passes"],
        "test_moe_gemm_a8w8_blockscale": ["passes"] * 4,
        "test_ff_a16w16_fused": ["passes", "FAILS", "FAILS", "passes"],
        "test_fused_gemm_afp4wfp4_a16w16": ["passes", "FAILS", "FAILS", "passes"],
    }


def test_a_wrong_value_is_answered_with_the_right_ones_and_keeps_what_ran(tmp_path):
    with pytest.raises(ReportError) as error:
        report.render(SWEEP, {"targets": "gfx95"}, tmp_path, progress=False)
    message = str(error.value)
    assert "did you mean 'gfx950'?" in message
    assert ", ".join(TARGETS) in message
    assert error.value.notebook == tmp_path / "01_stage_sweep.ipynb"
    ran = [cell for cell in cells(error.value.notebook) if cell["execution_count"]]
    assert ran
    assert "ParameterError" in error.value.html.read_text()


def test_a_wrong_name_starts_nothing(tmp_path):
    with pytest.raises(ParameterError, match="did you mean 'targets'"):
        report.render(SWEEP, {"target": "gfx950"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_papermill_refuses_an_unknown_parameter(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "papermill", SWEEP, tmp_path / "out.ipynb", "-p", "stage", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        # The environment's own kernel comes before one of the user's.
        env={**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"},
    )
    assert process.returncode != 0
    assert "'stage' is not a parameter; did you mean 'stages'?" in process.stderr


# The trial of estimates.

TRIAL = FOLDER / "04_estimates_on_trial.ipynb"


def test_the_trials_defaults_are_what_its_plan_asks_by_itself():
    defaults = parameters.parameters_of(TRIAL)
    given = {name: ast.literal_eval(defaults[name].default) for name in plan.ESTIMATES_TRIAL}
    assert plan.estimates_trial(**given) == plan.estimates_trial()


def test_the_trials_page_holds_every_estimate_and_what_the_rows_say_of_it(tmp_path):
    given = {
        "kernels": "moe_gemm_a8w4",
        "targets": "gfx950",
        "block_m": "32",
        "block_n": "512",
        "block_k": "256",
        "stages": "2",
        "store": str(tmp_path / "rows"),
    }
    page = report.render(TRIAL, given, tmp_path, progress=False).read_text()
    assert "Traceback" not in page
    assert page.count("<img") == 2
    rows = records.read(tmp_path / "rows")
    assert len(rows) == 2
    judged = estimates.judge(rows)
    for wrong in estimates.mistakes(judged).to_dict("records"):
        assert f"{wrong[estimates.ESTIMATED]:,}" in page
        assert f"{wrong[estimates.COMPILED]:,}" in page
    plain = re.sub(r"<[^>]+>", "", page)
    for sentence in estimates.conclusion(judged).splitlines():
        assert html.escape(re.sub(r"^- |\*\*", "", sentence), quote=False) in plain


# Two Tritons.

UPGRADE = FOLDER / "03_triton_upgrade.ipynb"


def test_the_upgrades_defaults_are_a_valid_grid():
    defaults = parameters.parameters_of(UPGRADE)
    given = {name: ast.literal_eval(defaults[name].default) for name in plan.PARAMETERS}
    assert {c.async_copy for c in plan.grid(**given)} == {"default"}


def test_the_upgrades_page_tells_what_changed(tmp_path, monkeypatch, pretend_triton):
    monkeypatch.setenv("MOELAB_TOOLCHAINS", str(tmp_path / "toolchains"))
    pretend_triton(toolchain.folder("99.1.0"), "99.1.0", async_copy=False)
    given = SMALL | {
        "tritons": f"{compiler.triton_version()},99.1.0",
        "stages": 2,
        "full": False,
        "store": str(tmp_path / "rows"),
    }
    page = report.render(UPGRADE, given, tmp_path, progress=False).read_text()
    assert "Traceback" not in page
    rows = records.read(tmp_path / "rows")
    assert sorted(rows["triton"]) == sorted(given["tritons"].split(","))
    conclusion = upgrade.conclusion(upgrade.pairs(rows.sort_values("triton")))
    plain = re.sub(r"<[^>]+>", "", page)
    assert html.escape(re.sub(r"^- |\*\*", "", conclusion), quote=False) in plain
    if compiler.default_async_copy(TARGETS["gfx950"]):
        assert "less LDS 1" in conclusion


# LDS against throughput.

TRADE = FOLDER / "02_lds_vs_throughput.ipynb"


def test_the_trades_page_holds_what_measured_and_published_rows_say(tmp_path):
    given = {
        "kernels": "moe_gemm_a8w8",
        "models": "Qwen3-235B-A22B",
        "layers": 1,
        "tp": "1",
        "m": 2560,
        "published_models": "GPT-OSS 120B",
    }
    page = report.render(TRADE, given, tmp_path, progress=False).read_text()
    assert "Traceback" not in page
    assert page.count("<img") == 7
    assert page.count('alt="Figure') == 7
    plain = re.sub(r"<[^>]+>", "", page)

    rows = trade.chosen(trade.measured(), "moe_gemm_a8w8", "Qwen3-235B-A22B", 1, 1)
    launches, before = (
        trade.chosen(published.launches(policy), models="GPT-OSS 120B")
        for policy in (published.POLICY, problems.BEFORE)
    )
    cells = cliffs.cells(launches, published.PUBLISHED, published.CURVE)
    falls = cliffs.steps(cells, published.CURVE)
    for conclusion in (
        trade.conclusion(rows, trade.stages(rows)),
        published.conclusion(launches, before),
        cliffs.conclusion(falls, cliffs.quicker(cells, published.CURVE), published.CURVE),
    ):
        for sentence in conclusion.splitlines():
            assert html.escape(re.sub(r"^- |\*\*", "", sentence), quote=False) in plain
    assert "M 1536 to 2560" in plain


def test_rows_that_nobody_measured_are_answered_with_those_there_are(tmp_path):
    with pytest.raises(ReportError, match="models: no row has 'Kimi'; there are DeepSeek-R1"):
        report.render(TRADE, {"models": "Kimi"}, tmp_path, progress=False)


# Ours and peers.

PEERS = FOLDER / "05_kernels_and_peers.ipynb"


def test_the_peers_page_holds_every_cell_and_what_the_rows_say(tmp_path, fabricated_peers):
    given = {"rows_path": str(fabricated_peers), "models": "Qwen3-235B-A22B"}
    page = report.render(PEERS, given, tmp_path, progress=False).read_text()
    assert "Traceback" not in page
    assert page.count("<img") == 1
    rows = trade.chosen(standings.measured(fabricated_peers), models="Qwen3-235B-A22B")
    table = standings.cells(rows)
    assert len(table) == 4
    plain = re.sub(r"<[^>]+>", "", page)
    told = standings.conclusion(rows, table) + "\n" + standings.losses(table)
    for sentence in told.splitlines():
        assert html.escape(re.sub(r"^- |\*\*", "", sentence), quote=False) in plain
    for reached in table[standings.PEERS]:
        assert f"<td>{reached}</td>" in page
    assert "no module deep_gemm" in page


@pytest.fixture
def fabricated_peers(tmp_path):
    """Rows as `bench.measure` gives them, of ours and two peers."""
    rows = []
    for of in plan.grid(
        kernels="moe_gemm_a8w8",
        targets="sm_90",
        models="Qwen3-235B-A22B,Llama4 Maverick",
        layers="all",
        m="512,1536",
        stages=2,
    ):
        problem = peers.plain(of.problem)
        timed = {
            "mode": "measured",
            "status": "ok",
            "run": "today",
            "gpu": "a GPU",
            "roof_tflops": 900.0,
            "made_by": json.dumps({"torch": "2.11.0"}),
        }
        ours = of.asked() | vars(problem) | timed
        torch = peers.Asked(of.kernel, problem, "sm_90", "torch", "gather").row() | timed
        absent = peers.Asked(of.kernel, problem, "sm_90", "deep_gemm").row() | timed
        for row, tflops in ((ours, 500.0), (torch, 400.0 + problem.m / 5)):
            time_us = 2 * problem.rows * problem.n * problem.k / tflops / 1e6
            times = {"time_low_us": time_us * 0.999, "time_high_us": time_us * 1.001}
            rows.append(row | {"tflops": tflops, "time_us": time_us} | times)
        reason = "no module deep_gemm"
        rows.append(absent | {"status": "unavailable", "reason": reason})
    frame = records.frame(rows).assign(moelab="0", schema=records.SCHEMA_VERSION, triton="3.6.0")
    return records.export(frame, tmp_path / "peers.parquet")


# Did it regress?

REGRESSION = FOLDER / "06_regression_report.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize("name", regression_report.cases())
def test_every_shipped_case_is_a_page_that_can_be_mailed(tmp_path, name):
    page = report.render(REGRESSION, {"case": name}, tmp_path, progress=False)
    assert page.stat().st_size < 2_000_000
    shown = page.read_text()
    assert "Traceback" not in shown
    case = regression_report.cases()[name]
    compared = regress.compare(*map(baselines.read, (case.baseline, case.candidate)))
    assert f'class="verdict {compared.verdict}"' in shown
    plain = re.sub(r"<[^>]+>", "", shown)
    assert html.escape(case.title, quote=False) in plain
    for sentence in regress.sentences(compared):
        assert html.escape(sentence, quote=False) in html.unescape(plain).replace("&", "&amp;")


def test_a_case_that_is_not_shipped_is_answered_with_those_that_are(tmp_path):
    with pytest.raises(ReportError, match="case: no case 'x'; there are two_stages_to_one"):
        report.render(REGRESSION, {"case": "x"}, tmp_path, progress=False)

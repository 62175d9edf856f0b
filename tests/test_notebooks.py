"""Notebooks as they are committed, and one small run from the first cell to the page."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moelab import parameters, plan, records, report, tables
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
                return eval(ast.unparse(node.args[1]), {"plan": plan})
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
    assert len(plan.grid(**given)) == 3072


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
    """The stage sweep, over 4 configurations and the tests that failed."""
    folder = tmp_path_factory.mktemp("report")
    given = SMALL | {"store": str(folder / "rows")}
    page = report.render("01_stage_sweep", given, folder / "out", progress=False)
    return folder, page


def test_the_page_has_every_section(rendered):
    _, path = rendered
    page = path.read_text()
    headings = [re.sub(r"<[^>]+>", "", text) for text in re.findall(r"<h[12][^>]*>.*?</h", page)]
    shown = " ".join(headings)
    for cell in cells(SWEEP, "markdown"):
        title = source(cell).splitlines()[0].lstrip("# ")
        assert title in shown
    assert page.count("<img") == 2
    assert "Traceback" not in page


def test_the_page_holds_what_the_rows_say(rendered):
    folder, path = rendered
    page = path.read_text()
    rows = records.read(folder / "rows")
    asked = rows[rows["model"] == "Llama4 Maverick"]
    assert len(asked) == 4
    for lds_bytes in asked["lds_bytes"]:
        assert f"{lds_bytes:,}" in page
    for sentence in tables.conclusion(asked).splitlines():
        words = re.sub(r"^- |\*\*", "", sentence)
        assert words in re.sub(r"<[^>]+>", "", page)
    assert "not compiled here" in page and "passes (16)" in page


def test_the_failing_tests_are_in_the_store_too(rendered):
    folder, _ = rendered
    rows = records.read(folder / "rows")
    assert len(rows[rows["model"].str.startswith("test_")]) == len(plan.aiter_tests())
    found = tables.aiter_tests(rows).set_index("test")
    assert found.loc["test_moe_gemm_a8w8", "before #2723, async copy off"].startswith("passes")


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

"""Imports go one way, and what needs neither torch nor triton loads neither."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import moelab

PACKAGE = Path(moelab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    """The module in a file, without the package's own name: ``kernels.routing``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path):
    """Every absolute name that a file imports, also inside functions and for types alone."""
    package = ["moelab", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def depends(path):
    """The modules of moelab that a file imports."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "moelab":
            continue
        # `from .specs import Tile` names what is in a module, `from . import specs` a module.
        inner = [".".join(parts[1:end]) for end in (len(parts), len(parts) - 1)]
        found |= {next((name for name in inner if name in MODULES), "")}
    return found - {"", name_of(path)}


GRAPH = {name: depends(path) for name, path in MODULES.items()}


def reached(name):
    """Everything that a module imports, at once or later."""
    seen, left = set(), [name]
    while left:
        for module in GRAPH[left.pop()] - seen:
            seen.add(module)
            left.append(module)
    return seen


def test_the_graph_is_read_from_the_files():
    assert {"compiler", "records", "targets"} <= GRAPH["sweep"]
    assert "specs" in GRAPH["kernels.launch"]
    assert "kernels.routing" in GRAPH["kernels.grouped_gemm"]
    assert "health" in GRAPH["cli"], "imports inside functions count"


def test_no_module_imports_its_caller():
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())
    assert order.index("specs") < order.index("compiler") < order.index("sweep")


def test_specs_know_the_standard_library_alone():
    assert GRAPH["specs"] == set()
    tops = {name.split(".")[0] for name in imports(MODULES["specs"])}
    assert tops <= sys.stdlib_module_names


READERS = (
    *("records", "tables", "plots", "lds_map", "targets", "problems", "estimates", "upgrade"),
    *("advice", "trade", "measurements", "published", "cliffs", "tuned", "standings"),
    *("regress", "paired_rounds", "baselines", "regression_report"),
)


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_rows_needs_nothing_that_measures(reader):
    forbidden = {"compiler", "sweep", "plan"} | {name for name in MODULES if "kernels" in name}
    assert reached(reader) & forbidden == set()


def test_the_compiler_knows_nothing_of_rows_and_kernels_nothing_of_the_compiler():
    assert reached("compiler") & {"records", "sweep", "tables", "plots"} == set()
    kernels = {module for name in MODULES if "kernels" in name for module in reached(name)}
    assert {name for name in kernels if "kernels" not in name} <= {
        "specs",
        "problems",
        "tuned",
        "disk",
    }


@pytest.mark.parametrize("name", MODULES)
def test_only_the_compiler_module_knows_tritons_compiler(name):
    found = {module for module in imports(MODULES[name]) if module.split(".")[0] == "triton"}
    if name == "compiler.pipeline":
        assert any(module.startswith("triton._C") for module in found)
    elif name.startswith("compiler"):
        pass
    elif "kernels" in name:
        assert {m for m in found if m.startswith(("triton.compiler", "triton._C"))} == set()
        assert {m for m in found if m.startswith("triton.backends")} == set()
    elif name == "stand_in.driver":
        # It stands where Triton's driver would: beside the compiler, not in it.
        around = ("triton.runtime", "triton.testing", "triton.backends.driver")
        assert {m for m in found if not m.startswith(around)} <= {"triton"}
    elif name == "peers":
        # It gives a peer what that peer misses in older Tritons.
        mended = ("triton.language.target_info", "triton.runtime.jit.JITFunction")
        assert found <= {"triton", "triton.language", "triton.runtime.jit", *mended}
    else:
        assert found == set()


def loaded(module):
    """What a fresh process has loaded after one import."""
    code = f"import json, sys; import {module}; print(json.dumps(sorted(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(json.loads(process.stdout))


def test_importing_moelab_loads_nothing_else():
    modules = loaded("moelab")
    assert {"torch", "triton", "pandas", "numpy", "matplotlib"} & modules == set()
    assert {name for name in modules if name.startswith("moelab")} == {"moelab"}


@pytest.mark.parametrize(
    "module", [*READERS, "cli", "plan", "report", "exports", "launches", "toolchain", "search"]
)
def test_reading_and_planning_load_neither_torch_nor_triton(module):
    assert {"torch", "triton"} & loaded(f"moelab.{module}") == set()


def test_the_command_line_is_there_before_anything_slow_is():
    assert {"pandas", "numpy", "matplotlib", "papermill"} & loaded("moelab.cli") == set()


READ = """
import json, sys
from moelab import plots, records, tables
rows = records.frame([])
plots.lds_against_limit(rows)
tables.conclusion(rows)
print(json.dumps(sorted({"torch", "triton"} & set(sys.modules))))
"""


def test_rows_are_read_and_drawn_without_torch_and_triton():
    process = subprocess.run(
        [sys.executable, "-c", READ], capture_output=True, text=True, check=True
    )
    assert json.loads(process.stdout) == []

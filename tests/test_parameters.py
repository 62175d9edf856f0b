import math
import os
import subprocess
import sys

import pytest

from moelab.parameters import ParameterError, as_list, given


def test_values_come_back_in_the_order_asked_for():
    assert list(given({"stages": 2, "arch": "gfx950"}, ["arch", "stages"]).items()) == [
        ("arch", "gfx950"),
        ("stages", 2),
    ]


def test_mistyped_name_raises_with_the_nearest_and_all_names():
    with pytest.raises(ParameterError) as error:
        given({"arch": "gfx950", "stages": 2, "stage": 3}, ["arch", "stages"])
    assert "'stage'" in str(error.value)
    assert "did you mean 'stages'?" in str(error.value)
    assert "arch, stages" in str(error.value)


def test_every_unknown_name_is_named():
    with pytest.raises(ParameterError, match=r"(?s)'stage'.*'zzz'"):
        given({"stages": 2, "stage": 3, "zzz": None}, ["stages"])


def test_parameter_error_is_a_value_error():
    assert issubclass(ParameterError, ValueError)


def test_missing_parameter_raises():
    with pytest.raises(ParameterError, match="arch"):
        given({}, ["arch"])


def test_imports_and_ipythons_own_names_are_not_parameters():
    namespace = {
        "_i1": "",
        "__name__": "__main__",
        "In": ["", "a cell"],
        "Out": {},
        "exit": object(),
        "quit": object(),
        "open": open,
        "get_ipython": lambda: None,
        "math": math,
        "given": given,
        "ParameterError": ParameterError,
        "arch": "gfx950",
    }
    exec("from __future__ import annotations", namespace)
    assert given(namespace, ["arch"]) == {"arch": "gfx950"}


def test_names_of_ipythons_start_up_files_are_not_parameters():
    chips = ["mi355x"]
    shell = type("Shell", (), {"user_ns_hidden": {"chips": chips, "stage": 1}})()
    namespace = {"get_ipython": lambda: shell, "chips": chips, "arch": "gfx950"}
    assert given(namespace, ["arch"]) == {"arch": "gfx950"}
    with pytest.raises(ParameterError, match="'stage'"):
        given(namespace | {"stage": 2}, ["arch"])


def test_cell_that_runs_again_ignores_the_notebooks_own_variables():
    namespace = {"arch": "gfx950", "rows": [1], "In": ["", "given()", "rows = [1]", "given()"]}
    assert given(namespace, ["arch"]) == {"arch": "gfx950"}
    with pytest.raises(ParameterError, match="'rows'"):
        given(namespace | {"In": ["", "rows = [1]", "given()"]}, ["arch"])


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1,2", int, [1, 2]),
        (" 1 , 2, ", int, [1, 2]),
        ("[1, 2]", int, [1, 2]),
        ("(1, 2,)", int, [1, 2]),
        (("a", "b"), str, ["a", "b"]),
        ("['a', 'b']", str, ["a", "b"]),
        ([1, 2], str, ["1", "2"]),
        (3, int, [3]),
        (3.0, int, [3]),
        ("1e-3", float, [0.001]),
        (1, float, [1.0]),
        ("true,False", bool, [True, False]),
        (False, bool, [False]),
        ("", int, []),
        ([], int, []),
    ],
)
def test_as_list_takes_what_users_pass(value, kind, expected):
    result = as_list(value, kind)
    assert result == expected
    assert [type(item) for item in result] == [kind] * len(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("1,x", int),
        ("1,,2", int),
        (1.5, int),
        ("1.5", int),
        (True, int),
        (None, str),
        ("a,,b", str),
        ("yes", bool),
        (1, bool),
        ([[1]], int),
        ([["a"]], str),
        ({"a": 1}, str),
    ],
)
def test_as_list_says_what_was_given_and_what_works(value, kind):
    with pytest.raises(ParameterError) as error:
        as_list(value, kind)
    assert repr(value) in str(error.value)
    assert f"is not {kind.__name__}" in str(error.value)
    assert "for example" in str(error.value)


@pytest.fixture
def kernel_of(tmp_path, monkeypatch):
    """Pretend that a process with this interpreter and arguments started the kernel."""
    started = []

    def start(python, *arguments):
        script = tmp_path / "papermill"
        script.write_text("echo ready\nread line\n")
        process = subprocess.Popen(
            [str(python), str(script), *arguments],
            executable="/bin/sh",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        # Popen returns within exec, when /proc may not have the command line yet.
        assert process.stdout.readline() == b"ready\n"
        monkeypatch.setenv("JPY_PARENT_PID", str(process.pid))

    yield start
    for process in started:
        process.communicate()


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


@needs_proc
def test_kernel_of_another_environment_raises(kernel_of, tmp_path):
    kernel_of(tmp_path / "other" / "bin" / "python", "a.ipynb", "b.ipynb")
    with pytest.raises(RuntimeError, match="--engine moelab") as error:
        given({"arch": "gfx950"}, ["arch"])
    assert sys.prefix in str(error.value)
    assert str(tmp_path / "other") in str(error.value)


@needs_proc
def test_kernel_of_the_same_environment_passes(kernel_of):
    kernel_of(os.path.join(sys.prefix, "bin", "python"), "a.ipynb", "b.ipynb")
    assert given({"arch": "gfx950"}, ["arch"])


@needs_proc
def test_kernel_asked_for_by_name_passes(kernel_of, tmp_path):
    kernel_of(tmp_path / "other" / "bin" / "python", "a.ipynb", "b.ipynb", "-k", "other")
    assert given({"arch": "gfx950"}, ["arch"])


def test_unknown_parent_passes(monkeypatch):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    assert given({"arch": "gfx950"}, ["arch"])

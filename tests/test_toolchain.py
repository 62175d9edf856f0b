"""Tritons side by side: found, installed, asked, and never mixed up."""

import contextlib
import os
import pickle
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import triton

from moelab import compiler, plan, records, sweep, targets, toolchain, upgrade
from moelab.launches import LaunchError
from moelab.specs import KernelLaunch
from moelab.toolchain import ToolchainError

NEWER = "99.1.0"


def grid(**changed):
    small = {"kernels": "moe_gemm_a8w8", "tiles": "16x64x64", "warps": 4, "m": 512}
    # For AMD each process would import PyTorch too.
    return plan.grid(**small | {"targets": "sm_90", "stages": 2} | changed)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_TOOLCHAINS", str(tmp_path / "toolchains"))
    return tmp_path / "toolchains"


@pytest.fixture
def newer(home, pretend_triton):
    """A home with one Triton, which says of itself that it is newer."""
    pretend_triton(toolchain.folder(NEWER), NEWER)
    return toolchain.find(NEWER)


@pytest.fixture
def no_pip(monkeypatch):
    """A pip that fails the way it does without a network."""

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "install"]
        Path(command[command.index("--target") + 1], "half").write_text("written")
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)


# Which there are.


def test_without_a_name_it_is_this_processs():
    for name in (None, triton.__version__):
        found = toolchain.find(name)
        assert found.is_here
        assert found.versions()[1] == triton.__version__


def test_what_was_installed_is_listed_by_version_and_found(home, pretend_triton):
    for version in ("3.10.0", "3.9.1", "3.10.0.dev3"):
        pretend_triton(toolchain.folder(version), version)
    (toolchain.folder("3.2.0")).mkdir()
    assert [found.name for found in toolchain.installed()] == ["3.9.1", "3.10.0", "3.10.0.dev3"]
    found = toolchain.find("3.9.1")
    assert not found.is_here
    assert found.versions()[1] == "3.9.1"


def test_what_was_never_filled_is_not_listed(newer):
    (toolchain.folder(".98.0-half") / "triton").mkdir(parents=True)
    assert [found.name for found in toolchain.installed()] == [NEWER]


def test_an_unknown_version_is_answered_with_those_there_are(newer):
    with pytest.raises(ToolchainError) as error:
        toolchain.find("3.0.0")
    message = str(error.value)
    assert f"there: {NEWER}; in this environment: {triton.__version__}" in message
    assert "moelab toolchain install 3.0.0" in message


def test_home_is_the_users_data_folder_unless_chosen(monkeypatch, tmp_path):
    monkeypatch.delenv("MOELAB_TOOLCHAINS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert toolchain.home() == tmp_path / "moelab" / "toolchains"


# Installing.


@pytest.mark.parametrize("version", ["latest", "3", "../3.7.1", "3.7.1; rm", "-r x"])
def test_what_is_no_version_is_refused_before_anything_is_made(home, version):
    with pytest.raises(ToolchainError, match=r"is no version of Triton; give for example 3\.7\.1"):
        toolchain.install(version)
    assert not home.exists()


def test_a_failed_install_has_pips_words_and_leaves_nothing(home, no_pip):
    with pytest.raises(
        ToolchainError, match=r"could not install triton 3\.7\.1: ERROR: no network"
    ):
        toolchain.install("3.7.1")
    assert toolchain.installed() == []
    assert list(toolchain.folder("*").parent.iterdir()) == []


def test_what_is_installed_is_not_installed_again(newer, no_pip):
    assert toolchain.install(NEWER) == newer


def test_only_what_was_installed_is_removed(newer, home):
    with pytest.raises(ToolchainError, match=r"no Triton '3\.0\.0'"):
        toolchain.remove("3.0.0")
    with pytest.raises(ToolchainError):
        toolchain.remove("..")
    toolchain.remove(NEWER)
    assert toolchain.installed() == []
    assert Path(triton.__file__).exists()


# Asking.


def test_each_triton_answers_in_rows_of_its_own(newer, tmp_path):
    store = tmp_path / "rows"
    rows = sweep.each(grid(), store, [triton.__version__, NEWER], jobs=1, progress=False)
    assert list(rows["triton"]) == [triton.__version__, NEWER]
    assert rows["compile_key"].is_unique
    assert rows["lds_bytes"].nunique() == 1, "it is the same Triton under two names"
    assert list(rows["status"]) == ["ok", "ok"]
    assert sorted(records.read(store)["triton"]) == sorted(rows["triton"])
    assert triton.__version__ == compiler.triton_version(), "this process has kept its own"


def test_async_copy_that_nobody_chose_is_each_tritons_own(home, tmp_path, pretend_triton):
    pretend_triton(toolchain.folder(NEWER), NEWER, async_copy=False)
    rows = sweep.each(
        grid(targets="gfx950"),
        tmp_path / "rows",
        [triton.__version__, NEWER],
        jobs=1,
        progress=False,
    )
    own = compiler.default_async_copy(targets.get("gfx950"))
    assert list(rows["async_copy"]) == [own, False]


def test_a_second_run_under_another_triton_compiles_nothing(newer, tmp_path):
    first = sweep.run(grid(), tmp_path / "rows", triton=NEWER, jobs=1, progress=False)
    journals = sorted((tmp_path / "rows").iterdir())
    again = sweep.run(grid(), tmp_path / "rows", triton=NEWER, jobs=1, progress=False)
    assert again.equals(first)
    assert sorted((tmp_path / "rows").iterdir()) == journals


def test_all_are_looked_for_before_any_is_asked(newer, tmp_path):
    with pytest.raises(ToolchainError, match=r"no Triton '3\.0\.0'"):
        sweep.each(grid(), tmp_path / "rows", [NEWER, "3.0.0"])
    assert not (tmp_path / "rows").exists()


def test_a_python_with_a_triton_of_its_own_borrows_the_rest(tmp_path, pretend_triton):
    """It has neither moelab nor PyTorch, nor anything but a Triton."""
    venv.create(tmp_path / "fork", symlinks=True)
    python = tmp_path / "fork" / "bin" / "python"
    (site,) = (tmp_path / "fork" / "lib").glob("*/site-packages")
    pretend_triton(site, "3.9.0+fork")
    found = toolchain.find(str(python))
    assert found.versions()[1] == "3.9.0+fork"
    questions = grid(targets="gfx950", async_copy="both")
    rows = sweep.run(questions, tmp_path / "rows", triton=str(python), jobs=1, progress=False)
    own = sweep.run(questions, tmp_path / "rows", jobs=1, progress=False)
    assert set(rows["triton"]) == {"3.9.0+fork"}
    assert list(rows["lds_bytes"]) == list(own["lds_bytes"])


def test_a_python_without_triton_is_told_in_its_words(tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    with pytest.raises(
        ToolchainError, match=r"bare.*: ModuleNotFoundError: No module named 'triton"
    ):
        sweep.run(grid(), tmp_path / "rows", triton=str(python), progress=False)


def test_a_program_that_is_no_python_is_told_as_such(tmp_path):
    with pytest.raises(ToolchainError, match="/bin/true is no Python"):
        sweep.run(grid(), tmp_path, triton="/bin/true", progress=False)


@pytest.mark.parametrize("name", ["/nowhere/python", "/tmp"])
def test_what_is_no_python_is_refused(name):
    with pytest.raises(ToolchainError, match="is not a Python that can be started"):
        toolchain.find(name)


def test_an_error_of_the_question_arrives_as_one(newer, tmp_path):
    store = tmp_path / "file"
    store.write_text("")
    with pytest.raises(OSError):
        sweep.run(grid(), store, triton=NEWER, jobs=1, progress=False)


def test_a_launch_that_another_triton_refuses_arrives_as_one(newer, tmp_path):
    (tmp_path / "kernel.py").write_text(
        "import triton\n\n\n@triton.jit\ndef nothing(x_ptr):\n    pass\n"
    )
    question = KernelLaunch(
        f"{tmp_path}/kernel.py:nothing", '{"x_ptr":"*bf16"}', '{"wrong":1}', 4, 2, None, "sm_90"
    )
    with pytest.raises(LaunchError, match="options: no 'wrong'"):
        sweep.run([question], tmp_path / "rows", triton=NEWER, jobs=1, progress=False)


def test_another_triton_leaves_ctrl_c_to_who_asked_and_ends_quietly_by_sigterm(
    tmp_path,
):
    script = (
        "import os, signal\n"
        "from moelab import sweep\n"
        "def answered(*_):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "sweep._answered = answered\n"
        "sweep.serve(os.getppid())\n"
    )
    request = pickle.dumps(([], tmp_path, {}))
    ended = subprocess.run([sys.executable, "-c", script], input=request, capture_output=True)
    assert (ended.returncode, ended.stderr) == (143, b"")


# With Tritons from the package index.


@pytest.mark.slow
def test_async_copy_by_default_costs_the_seeds_tile_its_fit(monkeypatch, tmp_path):
    if triton.__version__ != "3.9.0":
        pytest.skip("compares 3.7.1 with 3.9.0")
    monkeypatch.setenv("MOELAB_TOOLCHAINS", os.environ.get("MOELAB_TOOLCHAINS", str(tmp_path)))
    toolchain.install("3.7.1")
    questions = plan.grid(
        kernels="moe_gemm_a8w4", targets="gfx950", tiles="128x512x256", warps=8, stages=2
    )
    rows = sweep.each(questions, tmp_path / "rows", ["3.7.1", "3.9.0"], progress=False)
    assert list(rows["lds_bytes"]) == [102_400, 210_880]
    (pair,) = upgrade.pairs(rows).to_dict("records")
    assert pair["verdict"] == "no longer fits"
    assert (pair["async copy before"], pair["async copy after"]) == ("off", "on")


@pytest.mark.slow
def test_a_process_of_another_triton_ends_with_its_parent(newer, tmp_path):
    script = (
        "import os, threading\n"
        "from moelab import plan, sweep\n"
        "threading.Timer(5, lambda: os._exit(9)).start()\n"
        "grid = plan.grid(kernels='moe_gemm_a8w4', targets='gfx950', tiles='128x512x256',\n"
        "                 warps=8, stages='1,2,3,4')\n"
        f"sweep.run(grid, {str(tmp_path / 'rows')!r}, full=True, jobs=1, triton={NEWER!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 9, ended.stderr
    deadline = time.monotonic() + 5
    while left := started_with(f"MOELAB_TOOLCHAINS={tmp_path}"):
        assert time.monotonic() < deadline, f"processes {left} compile on for nobody"
        time.sleep(0.1)


def started_with(variable):
    """The processes, but for this one, that have a variable in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(path.parent.name)
    return found


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    for name in ("MOELAB_TOOLCHAINS", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(ToolchainError, match="no home folder; set MOELAB_TOOLCHAINS"):
        toolchain.find("99.1.0")

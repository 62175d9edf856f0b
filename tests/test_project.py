"""The project's own files agree with each other."""

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# What conda-forge calls differently.
CONDA_NAMES = {"torch": "pytorch"}


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(lines):
    parsed = [Requirement(line) for line in lines]
    return {CONDA_NAMES.get(of.name, of.name): set(map(str, of.specifier)) for of in parsed}


def test_conda_environment_is_in_step_with_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    named = requirements(line for line in conda if isinstance(line, str))
    python = named.pop("python")
    # conda wants pip named before a pip section.
    assert named.pop("pip") == set()
    assert conda[-1] == {"pip": ["-e ."]}
    assert named == requirements(pyproject()["dependencies"])
    assert python == set(pyproject()["requires-python"].split(","))


def test_every_import_of_the_package_is_a_named_dependency():
    """What comes with these is theirs: nbformat and jupyter_client with papermill, ..."""
    brought = {
        "nbformat": "papermill",
        "nbclient": "papermill",
        "jupyter_client": "ipykernel",
        "traitlets": "ipykernel",
        "IPython": "ipykernel",
        "bs4": "nbconvert",
        "elftools": "pyelftools",
        "pynvml": "nvidia-ml-py",
        # ROCm brings it, as it brings the driver.
        "amdsmi": "torch",
    }
    optional = pyproject()["optional-dependencies"].values()
    named = requirements([*pyproject()["dependencies"], *itertools.chain(*optional)])
    # Compared with ours where a user has them.
    named |= dict.fromkeys(("triton_kernels", "deep_gemm"))
    for path in (ROOT / "moelab").rglob("*.py"):
        imports = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
        for name in set(imports) - set(sys.stdlib_module_names) - {"moelab"}:
            name = brought.get(name, name)
            dependency = CONDA_NAMES.get(name, name)
            assert dependency in named, f"{path.name} imports {name}"


def test_the_package_and_its_metadata_have_one_version():
    import moelab

    assert moelab.__version__ == pyproject()["version"]


def test_ci_runs_the_readmes_test_command():
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "make test" in commands
    assert "make test" in (ROOT / "README.md").read_text()


def test_no_file_is_too_large_to_mail():

    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    large = {name for name in tracked if name and (ROOT / name).stat().st_size > 2 << 20}
    assert large == set()

"""What is said of a machine, whole or broken, and of what made some rows."""

import importlib.metadata
import json
import sys
from dataclasses import asdict

import pytest

from moelab import compiler, health, problems, records, targets

ROW = {
    "kernel": "moe_gemm_a8w8",
    **asdict(problems.problem("Llama4 Maverick", 1, 1, 512)),
    "target": "gfx950",
    "triton": "3.9.0",
    "num_stages": 1,
    "status": "ok",
    "compile_key": "a",
    "method": "allocation",
    "moelab": "0.1.0",
    "schema": 1,
}


def test_what_is_installed_is_told_by_version_and_what_is_not_by_none(monkeypatch):
    monkeypatch.setattr(health, "_PACKAGES", (*health._PACKAGES, "no-such-package"))
    installed = health.examine()["installed"]
    assert installed["triton"] == importlib.metadata.version("triton")
    assert installed["no-such-package"] is None


def test_findings_are_plain_json():
    found = health.examine()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1


def test_a_known_lowering_is_told_as_quick():
    version = compiler.triton_version()
    if not all(compiler.is_checked(targets.get(name)) for name in ("gfx950", "sm_90")):
        pytest.skip(f"the lowering of Triton {version} is not a checked one")
    assert health.examine()["works"]["sweep"].startswith(f"yes: Triton {version}")


def test_an_unknown_lowering_is_told_as_slow_with_the_vendor(monkeypatch):
    monkeypatch.setattr(compiler, "is_checked", lambda target: target.backend == "cuda")
    said = health.examine()["works"]["sweep"]
    assert said.startswith("yes, slowly")
    assert "for AMD is not one that was checked" in said
    monkeypatch.setattr(compiler, "is_checked", lambda target: False)
    assert "for AMD and NVIDIA" in health.examine()["works"]["sweep"]


def test_a_triton_that_does_not_work_is_a_finding_and_no_exception(monkeypatch):
    def broken(target):
        raise ImportError("libtriton.so: cannot open shared object file")

    monkeypatch.setattr(compiler, "is_checked", broken)
    assert health.examine()["works"]["sweep"] == (
        "no: Triton does not work: libtriton.so: cannot open shared object file"
    )


def test_a_missing_torch_is_a_finding_and_no_exception(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = health.examine()
    assert found["gpu"] is None
    assert found["works"]["kernels on a GPU"].startswith("no: PyTorch does not work")


def test_a_missing_papermill_is_told_with_what_to_install(monkeypatch):
    versions = dict.fromkeys(health._PACKAGES, "1.0") | {"papermill": None}
    monkeypatch.setattr(health, "_version", versions.get)
    assert health.examine()["works"]["report"] == "no: install papermill"


@pytest.mark.parametrize(
    ("available", "cuda", "gpu", "said"),
    [
        (True, "12.8", "NVIDIA H200", "yes, on NVIDIA H200"),
        (False, "12.8", None, "no: PyTorch sees no GPU"),
        (False, None, None, "no: PyTorch is a CPU build"),
    ],
)
def test_the_gpu_is_named_or_the_reason_why_there_is_none(monkeypatch, available, cuda, gpu, said):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    found = health.examine()
    assert (found["gpu"], found["works"]["kernels on a GPU"]) == (gpu, said)


# Provenance.


def facts(*rows):
    table = health.provenance(records.frame(rows))
    return dict(zip(table["what"], table["value"], strict=True))


def test_provenance_counts_rows_and_compiles_and_names_versions():
    found = facts(
        ROW, ROW | {"m": 1536}, ROW | {"compile_key": "b", "triton": "3.8.0", "method": "full"}
    )
    assert (found["rows"], found["distinct compiles"]) == ("3", "2")
    assert found["Triton"] == "3.8.0, 3.9.0"
    assert found["moelab that wrote them"] == "0.1.0"
    assert found["LDS told by"] == (
        "compiler left after allocating LDS (2 rows); full compile (1 rows)"
    )


@pytest.mark.parametrize("rows", [[], [ROW | {"status": "compile_error", "method": None}]])
def test_provenance_of_rows_without_lds_raises_nothing(rows):
    found = facts(*rows)
    assert found["rows"] == str(len(rows))
    assert found["LDS told by"] == ""


def test_provenance_outside_a_checkout_says_that_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert facts(ROW)["moelab that reads them"].endswith("commit unknown")


def test_what_launchers_choose_from_is_told_and_a_changed_kernel_with_it(tmp_path, monkeypatch):
    from moelab import kernels, tuned

    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "nothing")
    monkeypatch.setenv("MOELAB_TUNED", str(tmp_path))
    assert health.examine()["tuned"] == {}
    path = tmp_path / "tuned_sm_90.json"
    row = tuned.Shape("moe_gemm_a8w8", 8, 2, 64, 64, True)._asdict()
    row |= {"block_m": 16, "block_n": 64, "block_k": 64, "m": 1, "num_warps": 4, "num_stages": 2}
    row |= {"time_us": 1.0, "runner_up_us": None, "compared": 1}
    for source, stale in ((kernels.source_hash("moe_gemm_a8w8"), False), ("another", True)):
        row["made_by"] = {"source": source, "gpu": "a GPU", "date": "a day"}
        tuned.save([row], "sm_90", path)
        said = health.examine()["tuned"][str(path)]
        assert said.startswith("1 choices, a GPU, a day")
        assert ("stale: moe_gemm_a8w8 changed" in said) == stale
    path.write_text("{}")
    assert health.examine()["tuned"][str(path)].startswith("not usable: ")

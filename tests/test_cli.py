"""What a user types, and what comes back on stdout, stderr and as exit status."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from moelab import (
    answers,
    cli,
    compiler,
    disk,
    launcher,
    peers,
    plan,
    records,
    report,
    sweep,
    toolchain,
)
from moelab.cli import app
from moelab.kernels import KERNELS
from moelab.problems import DENSE
from moelab.targets import TARGETS

EXAMPLE = [
    *("sweep", "--kernel", "moe_gemm_a8w4", "--target", "gfx950", "--tile", "128x512x256"),
    *("--warps", "8", "--stages", "1,2", "--async-copy", "both"),
]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def no_workers(monkeypatch):
    """Fail the test if anything is compiled."""
    import pebble

    monkeypatch.setattr(pebble, "ProcessPool", lambda *_, **__: pytest.fail("a worker started"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The documented example, run as a user runs it."""
    store = tmp_path_factory.mktemp("store")
    process = subprocess.run(
        [
            Path(sys.executable).with_name("moelab"),
            *EXAMPLE,
            "--json",
            "--jobs",
            "1",
            "--store",
            store,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=store.parent,
    )
    return process, store


# sweep.


def test_json_is_one_line_per_row_and_stdout_has_nothing_else(swept):
    process, _ = swept
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 4
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert (row["kernel"], row["target"]) == ("moe_gemm_a8w4", "gfx950")
        assert row["triton"] == compiler.triton_version()
        assert (row["block_m"], row["block_n"], row["block_k"]) == (128, 512, 256)
        assert (row["num_warps"], row["lds_limit"]) == (8, 163_840)
        assert row["status"] == ("ok" if row["lds_bytes"] <= row["lds_limit"] else "out_of_lds")
    assert [(row["num_stages"], row["async_copy"]) for row in rows] == [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
    ]


def test_the_example_finds_the_regression(swept):
    if not compiler.triton_version().startswith(("3.8.", "3.9.")):
        pytest.skip(f"figures of Triton 3.8 and 3.9, not {compiler.triton_version()}")
    process, _ = swept
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    found = {(row["num_stages"], row["async_copy"]): row for row in rows}
    assert (found[2, False]["lds_bytes"], found[2, False]["status"]) == (102_400, "ok")
    assert (found[2, True]["lds_bytes"], found[2, True]["status"]) == (210_880, "out_of_lds")
    assert found[1, False]["status"] == found[1, True]["status"] == "ok"


def test_progress_is_on_stderr(swept):
    process, _ = swept
    assert "compile:" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_second_run_answers_from_the_store(swept, no_workers):
    process, store = swept
    again = run(*EXAMPLE, "--json", "--store", store)
    assert again.exit_code == 0, again.output
    assert again.stdout == process.stdout
    assert again.stderr == ""


def test_without_json_rows_are_a_table(swept, no_workers):
    _, store = swept
    result = run(*EXAMPLE, "--store", store)
    assert result.exit_code == 0, result.output
    header, *lines = result.stdout.splitlines()
    assert header.split()[:3] == ["kernel", "target", "triton"]
    assert len(lines) == 4
    assert all("128x512x256" in line and "163840" in line for line in lines)
    # Columns without a figure are left out: nothing was compiled to the end.
    assert "registers" not in header


def test_rows_are_exported_on_request(swept, no_workers, tmp_path):
    _, store = swept
    path = tmp_path / "rows.parquet"
    result = run(*EXAMPLE, "--store", store, "--export", path)
    assert result.exit_code == 0, result.output
    assert len(records.read(path)) == 4


def answer_all(monkeypatch, status, reason=None):
    """Give every configuration the same answer, without compiling."""

    def answer(configurations, full, jobs, timeout_s, memory):
        for key, configuration in configurations.items():
            yield {key: answers.stamped(status, reason, TARGETS[configuration.target])}

    monkeypatch.setattr(sweep, "compile_all", answer)


def test_all_kernels_are_every_kernel_there_is(tmp_path, monkeypatch):
    answer_all(monkeypatch, "ok")
    given = ["sweep", "--kernel", "all", "--target", "sm_90", "--stages", "1", "--layer", "all"]
    result = run(*given, "--store", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert list(dict.fromkeys(row["kernel"] for row in rows)) == list(KERNELS)
    assert {row["kernel"] for row in rows if row["layer"] == 2} == set(KERNELS) - set(DENSE)


def test_formats_arrive_in_the_rows_and_are_shown_where_they_vary(tmp_path, monkeypatch):
    answer_all(monkeypatch, "ok")
    given = [
        *("sweep", "--kernel", "moe_gemm_a8w4", "--target", "gfx950", "--stages", "1"),
        *("--x-format", "fp8,mxfp8", "--y-format", "mxfp8", "--scale-layout", "rows,cdna4"),
        *("--store", tmp_path),
    ]
    rows = [json.loads(line) for line in run(*given, "--json").stdout.splitlines()]
    assert [(row["x_format"], row["y_format"], row["scale_layout"]) for row in rows] == [
        ("fp8", "mxfp8", "rows"),
        ("fp8", "mxfp8", "cdna4"),
        ("mxfp8", "mxfp8", "rows"),
        ("mxfp8", "mxfp8", "cdna4"),
    ]
    header, *_ = run(*given).stdout.splitlines()
    assert "x_format" in header and "scale_layout" in header
    assert "y_format" not in header


def test_a_shared_reduction_is_typed_and_shown_as_part_of_the_tile(tmp_path, monkeypatch):
    answer_all(monkeypatch, "ok")
    given = ["sweep", "--kernel", "fused_gemm_afp4wfp4_a16w16", "--target", "gfx950"]
    result = run(*given, "--tile", "64x32x512/7", "--warps", "8", "--store", tmp_path)
    assert result.exit_code == 0, result.output
    assert "64x32x512/7" in result.stdout


def test_many_rows_are_counted_and_a_compile_error_is_told_once_on_stderr(tmp_path, monkeypatch):
    answer_all(monkeypatch, "compile_error", "fp8e4nv not supported")
    arguments = ["--kernel", "moe_gemm_a8w8", "--target", "sm_80", "--m", "all", "--stages"]
    assert len(plan.grid(kernels="moe_gemm_a8w8", targets="sm_80", m="all", stages="1,2,3,4")) == 64
    result = run("sweep", *arguments, "1,2,3,4", "--store", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split()[-2:] == ["compile_error", "configurations"]
    assert len(result.stdout.splitlines()) == 1 + 4
    assert result.stderr.count("fp8e4nv not supported") == 1


SMALL = {"--kernel": "moe_gemm_a8w8", "--target": "gfx950"}


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("--kernel", "moe_gemm_a8w9", KERNELS),
        ("--target", "gfx95", ["did you mean 'gfx950'?", *TARGETS]),
        ("--model", "GPT", ["GPT-OSS 120B", "Llama4 Maverick"]),
        ("--layer", "3", ["1, 2"]),
        ("--tp", "0", ["tp: 0", "1 or more"]),
        ("--m", "many", ["m: 'many'", "1,2"]),
        ("--tile", "128x256x256", ["warps 4,8"]),
        ("--tile", "128x256", ["128x256x128"]),
        ("--warps", "8", ["tiles 128x256x256"]),
        ("--stages", "two", ["stages: 'two'", "1,2"]),
        ("--async-copy", "maybe", ["on, off, both, default"]),
        ("--x-format", "mxfp9", ["did you mean 'mxfp8'?", "fp8, mxfp8"]),
        ("--y-format", "fp16", ["bf16, fp32, fp8, mxfp8"]),
        ("--scale-layout", "columns", ["rows, cdna4"]),
        ("--jobs", "0", ["x>=1"]),
        ("--export", "rows.csv", ["rows.parquet"]),
    ],
)
def test_a_wrong_value_exits_2_with_the_right_ones_and_compiles_nothing(
    option, value, right, no_workers, tmp_path
):
    given = SMALL | {option: value}
    if option == "--tile" and value == "128x256":
        given["--warps"] = "8"
    result = run("sweep", *(part for pair in given.items() for part in pair), "--store", tmp_path)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    # click breaks long lines.
    said = " ".join(result.stderr.split())
    for word in right:
        assert word in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep", "--target", "gfx950"], "Missing option '--kernel'"),
        (["sweep", "--kernel", "all"], "Missing option '--target'"),
        (["sweep", "--kernal", "all"], "--kernel"),
        (["swep"], "swep"),
        (["report"], "Missing argument 'NOTEBOOK'"),
    ],
)
def test_a_mistyped_command_line_exits_2(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_store_that_cannot_be_written_is_an_error_in_one_line(no_workers, tmp_path):
    (tmp_path / "store").write_text("a file")
    result = run(*EXAMPLE, "--store", tmp_path / "store")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and str(tmp_path / "store") in result.stderr


# Maps.


def test_a_map_tells_which_buffer_takes_most_and_what_async_copy_added(tmp_path):
    if not compiler.triton_version().startswith(("3.8.", "3.9.")):
        pytest.skip(f"figures of Triton 3.8 and 3.9, not {compiler.triton_version()}")
    given = [*EXAMPLE[:-4], "--stages", "2", "--async-copy", "on", "--store", tmp_path, "--map"]
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert (
        "w takes 135,136 of 210,880 bytes: 2 stages of 67,568; async copy added one of them; "
        "the whole is 47,040 more than the limit of 163,840.\n"
    ) in result.stdout
    assert "moe_gemm_a8w4 128x512x256, 8 warps, 2 stages, gfx950, async copy on" in result.stdout
    (row,) = [json.loads(line) for line in run(*given, "--json").stdout.splitlines()]
    assert [buffer[0] for buffer in json.loads(row["buffers"])["buffers"]][:3] == [
        "x",
        "w",
        "w_scale",
    ]


@pytest.mark.parametrize(("mode", "told"), [("lds", 1), ("map", 1), ("full", 0), ("measured", 0)])
def test_a_full_compile_is_remarked_on_where_less_was_asked(mode, told, capsys):
    rows = records.frame([{"mode": mode, "method": "full", "status": "ok"}])
    cli._remarks(rows)
    assert capsys.readouterr().err.count("was not checked") == told


# lds.

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def total(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def wrong(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=7))


@triton.jit
def assembly(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    x = tl.inline_asm_elementwise("bogus $0, $1;", "=r,r", [x], tl.float32, True, 1)
    tl.store(x_ptr + tl.arange(0, BLOCK), x)
"""
LAUNCH = {"args": {"x_ptr": "*fp32:16", "out_ptr": "*fp32:16", "BLOCK": 1024}}


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A file with kernels and a launch of them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("sums.py").write_text(KERNEL)
    Path("launch.json").write_text(json.dumps(LAUNCH))
    return ("lds", "sums.py:total", "launch.json")


def test_the_lds_of_a_kernel_in_a_file_is_a_line_per_row(kernel):
    given = ["--target", "gfx950,sm_90", "--warps", "4,8", "--stages", "1"]
    result = run(*kernel, *given, "--async-copy", "both", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    keys = ("target", "num_warps", "num_stages", "async_copy", "status")
    assert [tuple(row[name] for name in keys) for row in rows] == [
        ("gfx950", 4, 1, False, "ok"),
        ("gfx950", 4, 1, True, "ok"),
        ("gfx950", 8, 1, False, "ok"),
        ("gfx950", 8, 1, True, "ok"),
        ("sm_90", 4, 1, None, "ok"),
        ("sm_90", 8, 1, None, "ok"),
    ]
    for row in rows:
        assert (row["kernel"], row["triton"]) == ("sums.py:total", compiler.triton_version())
        # A float of each warp.
        assert row["lds_bytes"] == 4 * row["num_warps"]
        assert row["lds_limit"] == TARGETS[row["target"]].lds_limit


def test_without_json_it_is_a_table_with_registers_and_a_map_on_request(kernel):
    result = run(*kernel, "--target", "gfx950", "--full", "--map")
    assert result.exit_code == 0, result.output
    header, line, *rest = result.stdout.splitlines()
    assert "registers" in header.split() and "ok" in line.split()
    assert "scratch of one operation" in "".join(rest)


def test_what_the_compiler_rejects_is_told_on_stderr_and_the_rest_is_kept(kernel):
    _, _, launch = kernel
    result = run("lds", "sums.py:wrong", launch, "--target", "gfx950,sm_90")
    assert result.exit_code == 0
    assert result.stdout.count("compile_error") == 2
    assert "axis" in result.stderr


def test_what_the_assembler_rejects_is_told_in_its_words_and_stdout_stays_clean(kernel):
    """In a process of its own: what compiles prints past Python."""
    given = ["sums.py:assembly", "launch.json", "--target", "gfx950,sm_90", "--full", "--json"]
    result = subprocess.run(
        [Path(sys.executable).with_name("moelab"), "lds", *given], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    amd, nvidia = [json.loads(line) for line in result.stdout.splitlines()]
    assert amd["status"] == nvidia["status"] == "compile_error"
    assert "invalid instruction" in amd["reason"]
    assert "'bogus'" in nvidia["reason"]


@pytest.mark.parametrize(
    ("file", "launch", "words"),
    [
        ("sums.py:totl", LAUNCH, "did you mean 'total'?"),
        ("sum.py:total", LAUNCH, "sum.py: no such file"),
        ("broken.py:total", LAUNCH, "broken.py can't be imported: ZeroDivisionError"),
        ("sums.py:total", {"args": {"x_ptr": "*fp32"}}, "2 of 3 parameters are missing"),
        ("sums.py:total", {"args": LAUNCH["args"] | {"x_ptr": "*fp33"}}, "did you mean '*fp32'?"),
        ("sums.py:total", LAUNCH | {"options": {"num_warp": 4}}, "did you mean 'num_warps'?"),
        ("sums.py:total", None, "launch.json: No such file"),
    ],
)
def test_a_wrong_kernel_or_launch_exits_2_with_what_would_be_right(kernel, file, launch, words):
    Path("broken.py").write_text("1 / 0")
    Path("launch.json").unlink()
    if launch is not None:
        Path("launch.json").write_text(json.dumps(launch))
    result = run("lds", file, "launch.json", "--target", "gfx950")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert words in " ".join(result.stderr.split())
    assert not Path("rows").exists()


# Toolchains.


def test_a_triton_that_is_not_there_exits_1_with_how_to_get_it(no_workers, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_TOOLCHAINS", str(tmp_path))
    result = run(*EXAMPLE, "--triton", "3.0.0", "--store", tmp_path / "rows")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "moelab toolchain install 3.0.0" in " ".join(result.stderr.split())


def test_tritons_are_listed_set_side_by_side_and_removed(tmp_path, monkeypatch, pretend_triton):
    monkeypatch.setenv("MOELAB_TOOLCHAINS", str(tmp_path / "toolchains"))
    pretend_triton(toolchain.folder("99.1.0"), "99.1.0")
    listed = [json.loads(line) for line in run("toolchain", "list", "--json").stdout.splitlines()]
    assert [each["triton"] for each in listed] == [compiler.triton_version(), "99.1.0"]
    given = ["sweep", "--kernel", "moe_gemm_a8w8", "--target", "sm_90", "--tile", "16x64x64"]
    given += ["--warps", "4", "--stages", "1", "--store", tmp_path / "rows", "--json"]
    result = run(*given, "--triton", "99.1.0", "--triton", compiler.triton_version())
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["triton"] for row in rows] == ["99.1.0", compiler.triton_version()]
    assert run("toolchain", "remove", "99.1.0").exit_code == 0
    assert len(run("toolchain", "list").stdout.splitlines()) == 1


# advise.

SEED = [
    *("advise", "--kernel", "moe_gemm_a8w4", "--target", "gfx950", "--tile", "128x512x256"),
    *("--warps", "8", "--async-copy", "on", "--keep", "block_m,block_n,num_warps"),
]


@pytest.fixture(scope="module")
def advised(tmp_path_factory):
    """Advice on the tile that no longer launches, and its store."""
    if not compiler.triton_version().startswith(("3.8.", "3.9.")):
        pytest.skip(f"launches with Triton {compiler.triton_version()}, not with 3.8 and 3.9")
    store = tmp_path_factory.mktemp("advised")
    result = run(*SEED, "--json", "--top", "99", "--store", store)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()], store


def test_advice_is_the_base_then_what_was_compiled_in_full_and_fits(advised):
    (base, *found), store = advised
    assert (base["num_stages"], base["mode"], base["changed"]) == (2, "lds", None)
    kept = records.read(store)
    for row in found:
        assert (row["status"], row["mode"], row["method"]) == ("ok", "full", "full")
        assert row["lds_bytes"] <= row["lds_limit"] == 163_840
        assert row["triton"] == compiler.triton_version()
        same = kept[(kept["compile_key"] == row["compile_key"]) & (kept["mode"] == "full")]
        assert row["lds_bytes"] in set(same["lds_bytes"])
        assert (row["block_m"], row["block_n"], row["num_warps"]) == (128, 512, 8)
        assert row["expected_cost"] >= 1 and row["ordered_by"] == "expected"
        assert row["measured_time_us"] is None
    assert len({row["changed"] for row in found}) == len(found)


def test_the_tile_that_no_longer_launches_gets_its_three_ways_back(advised):
    (base, *found), _ = advised
    assert (base["status"], base["lds_bytes"]) == ("out_of_lds", 210_880)
    lds = {row["changed"]: row["lds_bytes"] for row in found}
    assert lds["stages 2 -> 1"] == 65_536
    assert lds["block_k 256 -> 128"] == 105_408
    assert lds["async copy on -> off"] == 102_400


def test_what_spills_is_not_the_first_choice(advised):
    (_, *found), _ = advised
    spilled = [row["spilled_registers"] for row in found]
    assert spilled[0] == 0 < max(spilled)


def test_advice_as_text_is_a_verdict_and_a_table(advised, no_workers):
    (base, *found), store = advised
    result = run(*SEED, "--store", store, "--top", "3")
    assert result.exit_code == 0, result.output
    verdict, problem, header, *lines = result.stdout.rstrip().splitlines()
    assert f"{base['lds_bytes']:,} of 163,840 bytes" in verdict
    assert f"First choice: {found[0]['changed']}" in verdict
    assert problem == "Of GPT-OSS 120B, layer 1, TP 1, M 8704:"
    assert header.split()[0] == "changed"
    # The quick fix comes last, for it was not among the first three.
    (fix,) = [row for row in found if row["changed"] == "stages 2 -> 1"]
    for row, line in zip([*found[:3], fix], lines, strict=True):
        assert " ".join(line.split()).startswith(f"{row['changed']} 128x512x")


def test_advice_follows_measurements_where_there_are_some(advised, no_workers, tmp_path):
    (_, *found), store = advised
    last = found[-1]
    names = ("kernel", "target", "tile", "num_warps", "num_stages", "async_copy", "m", "n", "k")
    path = tmp_path / "times.csv"
    path.write_text(f"{','.join(names)},time_us\n{','.join(str(last[n]) for n in names)},10\n")
    result = run(*SEED, "--json", "--store", store, "--measured", path)
    assert result.exit_code == 0, result.output
    _, first, second, *_ = [json.loads(line) for line in result.stdout.splitlines()]
    assert first["changed"] == last["changed"]
    assert (first["measured_time_us"], first["ordered_by"]) == (10, "measured on gfx950")
    assert second["ordered_by"] == "expected"


def test_measurements_without_their_columns_are_an_error_before_anything_is_compiled(
    no_workers, tmp_path
):
    path = tmp_path / "times.csv"
    path.write_text("kernel,time_us\na,1\n")
    result = run(*SEED, "--measured", path, "--store", tmp_path / "store")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{path}: measurements have no column target, num_warps" in result.stderr
    assert not (tmp_path / "store").exists()


def test_without_a_tile_every_published_one_is_answered(tmp_path, monkeypatch):
    """What has fewer than 128 rows, or one stage, fits; some of the rest in one launch alone."""

    def answer(configurations, full, jobs, timeout_s, memory):
        for key, c in configurations.items():
            large = c.tile.block_m == 128 and c.num_stages > 1
            narrow = c.tile.block_n < 512 and c.problem.layer == 1
            fits = not large or narrow
            stamp = answers.stamped("ok" if fits else "out_of_lds", None, TARGETS[c.target])
            found = {"registers": 200, "spilled_registers": 0, "workgroups_per_cu": 1}
            lds = {"lds_bytes": 100_000 if fits else 200_000 - c.problem.layer}
            yield {key: stamp | lds | (found if full else {})}

    monkeypatch.setattr(sweep, "compile_all", answer)
    given = ["advise", "--kernel", "moe_gemm_a8w4", "--target", "gfx950", "--json"]
    result = run(*given, "--store", tmp_path, "--top", "99")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    bases = [row for row in rows if row["changed"] is None]
    ruled = plan.grid(
        kernels="moe_gemm_a8w4", targets="gfx950", models="all", layers="all", tp="all", m="all"
    )
    assert {row["tile"] for row in bases} == {str(c.tile) for c in ruled}
    (out,) = [row for row in bases if row["status"] == "out_of_lds"]
    assert (out["tile"], out["layer"]) == ("128x512x256", 1)
    # Half as wide it fits in layer 1, which was asked, and not in layer 2: not proposed.
    proposed = [row for row in rows if row["changed"] is not None]
    assert proposed
    assert all(row["block_m"] < 128 or row["num_stages"] == 1 for row in proposed)


def test_what_fits_is_offered_alternatives_only_on_request(tmp_path, monkeypatch):
    answer_all(monkeypatch, "ok")
    given = ["advise", "--kernel", "moe_gemm_a8w8", "--target", "gfx950", "--tile", "16x64x64"]
    given += ["--warps", "4", "--store", tmp_path, "--json"]
    assert len(run(*given).stdout.splitlines()) == 1
    rows = [json.loads(line) for line in run(*given, "--all").stdout.splitlines()]
    assert len(rows) > 2 and "unchanged" in {row["changed"] for row in rows}


def test_what_does_not_compile_is_told_in_the_compilers_words(tmp_path, monkeypatch):
    answer_all(monkeypatch, "compile_error", "fp8e4nv not supported")
    given = ["advise", "--kernel", "moe_gemm_a8w8", "--target", "sm_80", "--tile", "16x64x64"]
    result = run(*given, "--warps", "4", "--store", tmp_path)
    assert result.exit_code == 0, result.output
    assert "compile_error: fp8e4nv not supported No neighbour" in result.stdout


def test_a_wrong_value_of_advise_exits_2_with_the_right_ones(no_workers, tmp_path):
    given = [*SEED[:-1], "blockk", "--store", tmp_path]
    answer = run(*given)
    assert answer.exit_code == 2
    assert "did you mean 'block_k'?" in " ".join(answer.stderr.split())


@pytest.mark.parametrize("name", ["tile", "y-format"])
def test_advice_on_a_launch_takes_no_option_of_a_model(no_workers, name):
    given = ["advise", "--kernel", "f.py:k", "--launch", "l.json", "--target", "gfx950"]
    answer = run(*given, f"--{name}", "fp8")
    assert answer.exit_code == 2
    assert f"--{name} is of moelab's own kernels; leave it out with --launch" in answer.stderr


@pytest.mark.parametrize("command", ["sweep", "advise"])
def test_a_kernel_in_a_file_is_sent_to_the_commands_that_take_it(no_workers, command):
    answer = run(command, "--kernel", "f.py:k", "--target", "gfx950")
    assert answer.exit_code == 2
    said = " ".join(answer.stderr.split())
    assert "`moelab lds`" in said and "`moelab advise --launch LAUNCH.json`" in said


# Help.


def commands():
    return {"": app} | {name: command for name, command in app.commands.items()}


@pytest.mark.parametrize("name", [name for name in commands() if name])
def test_every_command_has_help_with_an_example(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    example = result.stdout.split("Example:\n")[1].strip().splitlines()[0]
    assert example.startswith(f"moelab {name}")
    for parameter in app.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_the_documented_example_of_sweep_is_a_valid_one(swept, no_workers):
    _, store = swept
    text = run("sweep", "--help").stdout.split("Example:\n")[1].split("Options:")[0]
    words = text.replace("\\", " ").split()
    assert words[0] == "moelab"
    assert words[1:] == EXAMPLE
    assert run(*words[1:], "--store", store).exit_code == 0


def test_help_lists_every_command_and_the_version_is_told():
    shown = run("--help").stdout
    assert all(name in shown for name in app.commands)
    assert "version" in run("--version").stdout


# targets and doctor.


def test_targets_as_json_is_one_line_each_with_every_source():
    result = run("targets", "--json")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [target["name"] for target in found] == list(TARGETS)
    assert all(target["sources"]["lds_limit"] for target in found)


def test_targets_as_text_names_limit_and_chips():
    result = run("targets")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("gfx950")]
    assert "163,840" in line and "MI355X" in line
    assert len(result.stdout.splitlines()) == 1 + len(TARGETS)


def test_doctor_as_json_says_what_is_installed_and_works():
    found = json.loads(run("doctor", "--json").stdout)
    assert found["installed"]["triton"] == compiler.triton_version()
    assert found["works"]["sweep"].startswith("yes")


def test_doctor_as_text_has_a_line_per_finding():
    shown = run("doctor").stdout
    for word in ("triton", "sweep", "report", "kernels on a GPU"):
        assert any(line.strip().startswith(word) for line in shown.splitlines())


# report.


@pytest.fixture
def never_runs(monkeypatch):
    import papermill

    monkeypatch.setattr(
        papermill, "execute_notebook", lambda *_, **__: pytest.fail("the notebook ran")
    )


def test_a_wrong_parameter_name_exits_2_before_anything_runs(never_runs, tmp_path):
    out = tmp_path / "out"
    result = run("report", "01_stage_sweep", "-p", "stage", "2", "--out", out)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "did you mean 'stages'?" in " ".join(result.stderr.split())
    for name in ("kernels", "targets", "async_copy", "store", "jobs"):
        assert name in result.stderr
    assert not out.exists()


def test_an_unknown_notebook_exits_2_with_those_there_are(never_runs, tmp_path):
    result = run("report", "01_stage_swep", "--out", tmp_path)
    assert result.exit_code == 2
    assert "01_stage_sweep" in result.stderr


def test_values_arrive_with_their_types_and_the_path_is_all_of_stdout(monkeypatch, tmp_path):
    seen = {}

    def render(notebook, parameters, out, name):
        seen.update(notebook=notebook, parameters=parameters, out=out, name=name)
        return out / "a.html"

    monkeypatch.setattr(report, "render", render)
    pairs = {"jobs": "2", "f": "0.5", "on": "true", "off": "False", "no": "none", "m": "1,2"}
    given = [part for name, text in pairs.items() for part in ("-p", name, text)]
    result = run("report", "a", *given, "--out", tmp_path, "--name", "b")
    assert result.exit_code == 0, result.output
    assert seen["name"] == "b"
    assert result.stdout == f"{tmp_path / 'a.html'}\n"
    assert repr(seen["parameters"]) == repr(
        {"jobs": 2, "f": 0.5, "on": True, "off": False, "no": None, "m": "1,2"}
    )


def test_a_notebook_that_fails_exits_1_with_its_files(monkeypatch, tmp_path):
    def render(*_, **__):
        raise report.ReportError("a.ipynb: cell [2] raised ValueError: no\n  executed: b.ipynb")

    monkeypatch.setattr(report, "render", render)
    result = run("report", "a", "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "cell [2] raised ValueError" in result.stderr and "b.ipynb" in result.stderr


# measure.


@pytest.fixture
def measured(monkeypatch):
    """Let `moelab measure` find a GPU, on which one of two configurations fits."""
    from moelab import bench

    def measure(asked, store, **given):
        fits, does_not = (of.asked() for of in asked)
        timed = {
            "status": "ok",
            "lds_bytes": 8192,
            "loaded_lds_bytes": 8192,
            "lds_limit": 232448,
            "time_us": 100.0,
            "time_low_us": 99.9,
            "time_high_us": 100.1,
            "throttled": "sw_power_cap",
        }
        return records.frame([fits | timed, does_not | {"status": "out_of_lds"}])

    monkeypatch.setattr(bench, "gpu", lambda: launcher.Gpu("a GPU", TARGETS["sm_90"]))
    monkeypatch.setattr(bench, "measure", measure)
    return ("measure", "--kernel", "moe_gemm_a8w8", "--tile", "64x64x128", "--warps", "4")


def test_the_last_lines_of_a_measurement_are_the_tally(measured):
    result = run(*measured)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-3:] == [
        "2 configurations asked, 1 launched, 1 timed; not timed: 1 out_of_lds",
        "LDS told = loaded in 1 of 1; OutOfResources 0; told to fit and left out 0",
        "THROTTLED: the GPU held its clocks down (sw_power_cap) during 1 of 1 times",
    ]


def test_measured_rows_as_json_are_all_of_stdout(measured):
    result = run(*measured, "--json")
    assert [json.loads(line)["time_us"] for line in result.stdout.splitlines()] == [100, None]
    assert "LDS told = loaded in 1 of 1" in result.stderr


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([], ()),
        (["--peers"], tuple(peers.PEERS)),
        (["--peers", "all"], tuple(peers.PEERS)),
        (["--peers", "torch,triton_kernels"], ("torch", "triton_kernels")),
    ],
)
def test_peers_are_asked_for_by_name_or_all_with_problems_that_they_compute(
    measured, monkeypatch, given, names
):
    from moelab import bench

    told, stand_in = {}, bench.measure

    def measure(asked, store, **options):
        told.update(asked=asked, **options)
        return stand_in(asked, store)

    monkeypatch.setattr(bench, "measure", measure)
    assert run(*measured, *given).exit_code == 0
    assert told["peers"] == names
    plain = [of.problem == peers.plain(of.problem) for of in told["asked"]]
    assert plain == [bool(names)] * len(plain)


@pytest.fixture
def two_sides(measured, monkeypatch, tmp_path):
    """Let `moelab measure --ab` find a GPU on which the candidate takes longer by a factor."""
    from test_regress import timed

    from moelab import ab

    told = {}

    def measure(asked, base, candidate, store, **how):
        told.update(asked=asked, sides=(str(base), str(candidate)), **how)
        sides = {"base": 1.0, "candidate": told.get("factor", 1.0)}
        return records.frame(timed(side=side, by=by) for side, by in sides.items())

    monkeypatch.setattr(ab, "measure", measure)
    return (*measured, "--store", tmp_path / "rows"), told


@pytest.mark.parametrize(("factor", "exit_code"), [(1.0, 0), (1.2, 1)])
def test_an_ab_run_ends_with_the_verdict_and_its_rows_have_the_same(
    two_sides, factor, exit_code, tmp_path
):
    command, told = two_sides
    told["factor"] = factor
    export, summary = tmp_path / "rows.parquet", tmp_path / "summary.md"
    result = run(
        *(*command, "--ab", "stages=1", "--ab", "stages=most", "--threshold", "4%"),
        *("--export", export, "--markdown", summary),
    )
    assert (result.exit_code, told["sides"]) == (exit_code, ("stages=1", "stages=most"))
    assert told["threshold"] == 0.04
    # As many as the procedure takes, of one stage count.
    assert "rounds" not in told
    assert {of.num_stages for of in told["asked"]} == {2}
    verdict = "passed" if exit_code == 0 else "regressed"
    assert result.stdout.splitlines()[0] == verdict
    assert summary.read_text().startswith(f"## moelab compare: {verdict}")
    again = run("compare", f"{export}@side=base", f"{export}@side=candidate", "--threshold", "4%")
    assert (again.exit_code, again.stdout) == (result.exit_code, result.stdout)


def test_an_ab_run_as_json_is_one_object(two_sides):
    command, told = two_sides
    result = run(*command, "--ab", "same", "--ab", "same", "--json", "--rounds", "12", "--apart")
    assert json.loads(result.stdout)["verdict"] == "passed"
    assert (told["rounds"], told["apart"]) == (12, True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--ab", "same"), "--ab is given 1 times; give it twice"),
        (("--ab", "same", "--ab", "colour=blue"), "no 'colour'; a side is `same`, or some of"),
        (("--ab", "same", "--ab", "same", "--peers", "torch"), "leave it out with --ab"),
        (("--ab", "same", "--ab", "same", "--markdown", "a.parquet"), "name it a.md"),
        (("--ab", "same", "--ab", "same", "--markdown", "no/a.md"), "there is no folder no"),
        (("--apart",), "--apart is of --ab BASE --ab CANDIDATE"),
        (("--threshold", "4%"), "--threshold is of --ab"),
    ],
)
def test_wrong_use_of_two_sides_is_refused_before_anything_is_measured(two_sides, given, words):
    command, told = two_sides
    result = run(*command, *given)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not told


def test_an_ab_run_that_could_not_measure_is_no_regression(two_sides, monkeypatch):
    from moelab import ab
    from moelab.timing import MeasureError

    def measure(*_, **__):
        raise MeasureError("the worker of the base did not start")

    monkeypatch.setattr(ab, "measure", measure)
    result = run(*two_sides[0], "--ab", "same", "--ab", "same")
    assert result.exit_code == 2
    assert "did not start" in result.stderr


def test_an_ab_run_that_was_interrupted_is_no_regression(two_sides, monkeypatch):
    from moelab import ab

    def measure(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ab, "measure", measure)
    result = run(*two_sides[0], "--ab", "same", "--ab", "same")
    assert result.exit_code == 130
    assert "no verdict" in result.stderr


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("cutlass", "no peer 'cutlass'; there are torch, torch_precise,"),
        ("deep_gemm", "asked are moe_gemm_a8w8; peers have others: deep_gemm"),
    ],
)
def test_peers_that_there_are_not_are_refused_before_anything_is_measured(measured, names, words):
    result = run(*measured, "--peers", names)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


# tune.


def test_tuning_without_a_gpu_says_so(tmp_path):
    result = run("tune", "--out", tmp_path / "tuned.json", "--store", tmp_path / "rows")
    assert result.exit_code == 1
    assert "no GPU" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gpu(monkeypatch):
    from moelab import bench, targets

    monkeypatch.setattr(bench, "gpu", lambda: launcher.Gpu("a GPU", targets.get("sm_90")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "tuned"], "--out tuned: name it tuned.json"),
        ([], "give --out, such as tuned/tuned_sm_90.json, or set MOELAB_TUNED"),
        (["--out", "t.json", "--kernel", "ff_a16w16_fused"], "no 'ff_a16w16_fused'"),
        (
            ["--out", "t.json", "--model", "GPT-OSS 120B", "--kernel", "moe_gemm_a8w8"],
            "served with",
        ),
        (["--out", "t.json", "--m", "few"], "m: "),
        (["--out", "t.json", "--export", "rows.csv"], "name it rows.parquet"),
    ],
)
def test_what_cannot_be_tuned_is_told_before_anything_is_compiled(
    arguments, words, gpu, no_workers, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOELAB_TUNED", raising=False)
    result = run("tune", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_measured_before_become_a_file_without_a_gpu(tmp_path):
    from moelab import trade, tuned

    out = tmp_path / "tuned.json"
    result = run("tune", "--rows", trade.SHIPPED, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    gains = [json.loads(line) for line in result.stdout.splitlines()]
    # Of all problems but one only the published tiles are in it: the best of them is the best
    # there is. Of that one there are tiles with three block_m, and no published one among them.
    assert {row["gain"] for row in gains} == {1}
    assert len(gains) == len(tuned.read(out)["rows"]) - 3 == 260


def test_rows_of_several_targets_are_not_one_file(tmp_path):
    from moelab import trade

    rows = records.read(trade.SHIPPED).dropna(subset=["time_us"]).head(2)
    path = tmp_path / "rows.parquet"
    records.export(rows.assign(target=["sm_90", "gfx950"]), path)
    result = run("tune", "--rows", path, "--out", tmp_path / "tuned.json")
    assert result.exit_code == 1
    assert "one target" in result.stderr and "sm_90, gfx950" in result.stderr
    assert not (tmp_path / "tuned.json").exists()


# compare.


@pytest.fixture
def sides(tmp_path):
    """Write two sides of a comparison as exports, and name them."""
    from test_regress import row

    def write(baseline, candidate):
        names = []
        for name, changed in (("baseline", baseline), ("candidate", candidate)):
            rows = records.frame([row(m=512), row(m=2560, **changed)])
            names.append(records.export(rows, tmp_path / f"{name}.parquet"))
        return names

    return write


REFUSED = {"status": "out_of_lds", "lds_bytes": 2000}


@pytest.mark.parametrize(
    ("candidate", "code", "verdict"),
    [
        ({}, 0, "passed"),
        (REFUSED, 1, "regressed"),
        ({"status": "timeout"}, 3, "inconclusive"),
    ],
)
def test_the_exit_code_of_a_comparison_is_its_verdict(sides, candidate, code, verdict):
    result = run("compare", *sides({}, candidate))
    assert result.exit_code == code
    assert result.stdout.startswith(f"{verdict}\n")
    told = json.loads(run("compare", *sides({}, candidate), "--json").stdout)
    assert (told["verdict"], told["exit_code"], len(told["cells"])) == (verdict, code, 2)


def test_a_comparison_loads_neither_torch_nor_triton(sides):
    code = (
        "import sys; from moelab.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, {'torch', 'triton'} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, "compare", *sides({}, {})], capture_output=True, text=True
    )
    assert process.stdout.splitlines()[-1] == "0 set()", process.stderr


def test_a_comparison_is_summed_up_in_markdown_on_request(sides, tmp_path):
    path = tmp_path / "summary.md"
    assert run("compare", *sides({}, REFUSED), "--markdown", path).exit_code == 1
    assert path.read_text().startswith("## moelab compare: regressed\n")
    assert "`ok -> out_of_lds (100 -> 2,000 of 1,000 bytes)`" in path.read_text()


@pytest.mark.parametrize("damage", ["torn", "schema", "empty", "absent", "other cells"])
def test_a_damaged_side_exits_2_names_it_and_overwrites_nothing(sides, tmp_path, damage):
    baseline, candidate = sides({}, {})
    summary = tmp_path / "summary.md"
    summary.write_text("as it was")
    if damage == "torn":
        candidate.write_bytes(candidate.read_bytes()[:-100])
    elif damage == "schema":
        records.export(records.read(candidate).assign(schema=999), candidate)
    elif damage == "empty":
        records.export(records.frame([]), candidate)
    elif damage == "absent":
        candidate.unlink()
    else:
        records.export(records.read(candidate).assign(kernel="another"), candidate)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run("compare", baseline, candidate, "--markdown", summary)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert (str(candidate) if damage != "other cells" else "no cell is in both") in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_summary_does_not_take_the_place_of_rows(sides, suffix):
    baseline, candidate = sides({}, {})
    path = candidate.with_suffix(suffix)
    kept = path.read_bytes() if path.exists() else None
    result = run("compare", baseline, candidate, "--markdown", path)
    assert result.exit_code == 2
    assert "candidate.md" in result.stderr
    assert (path.read_bytes() if path.exists() else None) == kept


@pytest.mark.parametrize("threshold", ["3", "0", "-1%", "nan", "much", "100%"])
def test_a_threshold_that_is_no_share_exits_2(sides, threshold):
    result = run("compare", *sides({}, {}), "--threshold", threshold)
    assert result.exit_code == 2
    assert "give a share such as 3% or 0.03" in result.stderr


def test_a_threshold_may_be_typed_either_way(sides):
    thresholds = [
        json.loads(run("compare", *sides({}, {}), "--threshold", typed, "--json").stdout)
        for typed in ("5%", "0.05")
    ]
    assert {told["threshold"] for told in thresholds} == {0.05}


def test_the_shipped_sweep_is_compared_by_name():
    result = run("compare", "h200_stage_sweep@num_stages=1", "h200_stage_sweep@num_stages=2")
    assert result.exit_code == 1
    assert "The sides differ in num_stages (1 against 2)." in result.stdout


# compare --html.


def test_a_comparisons_report_is_one_file_and_what_rows_say_in_it_is_inert(
    tmp_path, monkeypatch, sides
):
    from test_regress import timed

    hostile = "<script>alert(1)</script>$\\frac{|`\x07\u202e" + 500 * "x"
    names = {"kernel": hostile, "model": hostile, "gpu": hostile, "run": "<b>run</b>"}
    for name, by in (("before", 1.0), ("after", 1.2)):
        made_by = json.dumps({"driver": hostile + name, "torch": name})
        rows = [timed(by=by, m=m, made_by=made_by, **names) for m in (512, 2560)]
        records.export(records.frame(rows), tmp_path / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    result = run("compare", "before.parquet", "after.parquet", "--html", "report.html")
    assert result.exit_code == 1, result.stderr
    assert result.stdout.startswith("regressed\n")
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 2_000_000
    assert 'class="verdict regressed"' in page
    assert "slower by more than 3%" in page
    assert "Traceback" not in page
    assert "<script>alert" not in page and "<b>run" not in page
    assert "&lt;script&gt;alert" in page
    assert not {"\x07", "\u202e"} & set(page)
    assert 301 * "x" not in re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "after.parquet",
        "before.parquet",
        "report.html",
    ]


@pytest.mark.parametrize("damage", ["torn", "absent", "other cells", "foreign", "no page"])
def test_a_report_that_can_not_be_made_exits_2_and_overwrites_nothing(sides, tmp_path, damage):
    baseline, candidate = sides({}, REFUSED)
    page = tmp_path / "report.html"
    page.write_text('<meta name="generator" content="moelab"> as it was')
    if damage == "torn":
        candidate.write_bytes(candidate.read_bytes()[:-100])
    elif damage == "absent":
        candidate.unlink()
    elif damage == "other cells":
        records.export(records.read(candidate).assign(kernel="another"), candidate)
    elif damage == "foreign":
        page.write_text("somebody's page")
    else:
        page = candidate
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    result = run("compare", baseline, candidate, "--html", page)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert (
        str(candidate) in result.stderr
        or str(page) in result.stderr
        or ("no cell is in both" in result.stderr)
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# How commands end.


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (disk.DiskFullError("rows: No space left on device"), 4, "Error: rows: No space left"),
        (
            sweep.Interrupted("interrupted; 3 of 4 rows are in rows"),
            130,
            "interrupted; 3 of 4 rows",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError("the store can't be written to"), 1, "Error: the store can't be written to"),
    ],
)
@pytest.mark.parametrize("command", ["sweep", "lds"])
def test_how_a_sweep_ended_is_its_exit_code_and_its_words(
    tmp_path, monkeypatch, command, ending, code, said
):
    def end(*_, **__):
        raise ending

    monkeypatch.setattr(sweep, "each", end)
    monkeypatch.setattr("moelab.plan.launches", lambda *_, **__: [])
    given = EXAMPLE[1:] if command == "sweep" else ["a.py:a", "a.json", "--target", "gfx950"]
    result = run(command, *given, "--store", tmp_path)
    assert result.exit_code == code
    assert said in result.stderr


@pytest.mark.parametrize(
    ("size", "read"),
    [("8G", 8 << 30), ("1.5g", 3 << 29), ("700M", 700 << 20), (str(1 << 31), 1 << 31)],
)
def test_a_memory_limit_is_read_with_its_unit(tmp_path, monkeypatch, size, read):
    given = {}

    def each(*_, **options):
        given.update(options)
        return records.frame([])

    monkeypatch.setattr(sweep, "each", each)
    assert run(*EXAMPLE, "--store", tmp_path, "--memory", size).exit_code == 0
    assert given["memory"] == read


@pytest.mark.parametrize("size", ["much", "8X", "", "G", "inf", "1e999G", "100M"])
def test_a_memory_limit_that_is_no_size_is_refused(tmp_path, size):
    result = run(*EXAMPLE, "--store", tmp_path, "--memory", size)
    assert result.exit_code == 2
    assert "give a size such as 8G; a compiler needs 512M to start" in result.stderr

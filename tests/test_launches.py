"""Kernels of anybody's, the launches that describe them, and what is wrong with either."""

import json
import subprocess
import sys

import pytest

from moelab import compiler, kernels, launches, plan, records, sweep, tables, targets
from moelab.launches import Constant, DType, LaunchError, Type
from moelab.parameters import ParameterError
from moelab.specs import KernelLaunch

MATMUL = """
import triton
import triton.language as tl

print("imported")


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, k, stride, BLOCK: tl.constexpr, ACT: tl.constexpr = "none"):
    rows = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, BLOCK):
        a = tl.load(a_ptr + rows[:, None] * stride + (start + rows)[None, :])
        b = tl.load(b_ptr + (start + rows)[:, None] * stride + rows[None, :])
        acc += tl.dot(a, b)
    if ACT == "relu":
        acc = tl.maximum(acc, 0)
    tl.store(c_ptr + rows[:, None] * stride + rows[None, :], acc)


tuned = triton.autotune(
    [
        triton.Config({"BLOCK": block, "waves_per_eu": 1}, num_warps=4, num_stages=stages)
        for block in (32, 64)
        for stages in (1, 2)
    ],
    key=["k"],
)(matmul)


@triton.jit
def rejected(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, tl.sum(tl.arange(0, BLOCK), axis=3))


@triton.jit
def paired(pair, out_ptr, KIND: tl.constexpr):
    tl.store(out_ptr, pair[0] + pair[1].to(KIND))


whole = triton.autotune(
    [triton.Config({}, num_warps=w, num_stages=s) for w in (4, 8) for s in (1, 2)],
    key=["k"],
)(matmul)

named = triton.autotune(
    [triton.Config({"BLOCK": tl.constexpr(32), "ACT": "relu"}), triton.Config({"BLOCK": 64})],
    key=["k"],
)(matmul)

typed = triton.autotune([triton.Config({"KIND": tl.bfloat16})], key=[])(paired)

calling = triton.autotune([triton.Config({"KIND": rejected})], key=[])(paired)

not_a_kernel = 3
"""
ARGS = {
    "a_ptr": "*bf16:16",
    "b_ptr": "*bf16:16",
    "c_ptr": "*fp32:16",
    "k": "i32:16",
    "stride": "i32:16",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("kernels")
    (found / "matmul.py").write_text(MATMUL)
    return found


def described(folder, kernel="matmul", args=None, options=None, **grid):
    """Questions about a kernel of the file, with a launch written beside it."""
    launch = folder / "launch.json"
    args = ARGS | {"BLOCK": 64} if args is None else args
    launch.write_text(json.dumps({"args": args, "options": options or {}}))
    return plan.launches(f"{folder}/matmul.py:{kernel}", launch, **{"targets": "gfx950"} | grid)


# What a LAUNCH.json may say.


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("*fp8e4nv:16", Type("*fp8e4nv", divisible=True)),
        ("*bf16", Type("*bf16")),
        ("*ki32:16", Type("*ki32", divisible=True)),
        ("*bf16:16:large", Type("*bf16", divisible=True, large=True)),
        ("i32:16", Type("i32", divisible=True)),
        ("i64", Type("i64")),
        ("i32:1", Constant(1)),
        ("fp32", Type("fp32")),
        ("tensordesc<bf16[64, 64]>", Type("tensordesc<bf16[64, 64]>")),
        (128, Constant(128)),
        (True, Constant(True)),
        (None, Constant(None)),
        ({"const": "relu"}, Constant("relu")),
        ({"dtype": "bf16"}, DType("bf16")),
        (["i32:16", 1, "*bf16"], (Type("i32", divisible=True), Constant(1), Type("*bf16"))),
    ],
)
def test_an_argument_is_a_type_or_a_constant(value, meant):
    assert launches.argument("x", value) == meant


def test_the_scalar_types_are_tritons():
    import triton.language as tl

    known = {*tl.dtype.SINT_TYPES, *tl.dtype.UINT_TYPES, *tl.dtype.FP_TYPES}
    assert {name.replace("int", "i").replace("ui", "u") for name in known} - {"i1"} == set(
        launches.SCALARS
    ) - {"i1", "u1"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("*fp8e4", "args: x is '*fp8e4', which is no type; did you mean '*fp8e4nv'?"),
        ("relu", 'a text constant is {"const": "..."}'),
        ("*bf16:8", "a hint is :16 (divisible by 16)"),
        ("*bf16:1", "a hint is :16"),
        ("fp32:large", "a hint is :16"),
        ("fp32:1", "a float has none"),
        ("fp32:16", "a float has none"),
        ("*", "which is no type."),
        ({"constant": 3}, 'args: x is {"constant": 3}; give a type or constant'),
        ({"dtype": "float"}, 'args: x is {"dtype": "float"}'),
    ],
)
def test_what_is_neither_is_answered_with_what_would_be(value, words):
    with pytest.raises(LaunchError) as error:
        launches.argument("x", value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON: "),
        ("[]", 'expected {"args": {...}, "options": {...}}'),
        ('{"args": []}', 'expected {"args": {...}, "options": {...}}'),
        ('{"args": {}, "option": {}}', "no 'option'; did you mean 'options'?"),
        ('{"args": {}, "options": 3}', "options is 3"),
    ],
)
def test_a_file_of_another_form_is_answered_with_the_right_one(tmp_path, text, words):
    (tmp_path / "launch.json").write_text(text)
    with pytest.raises(LaunchError) as error:
        launches.read(tmp_path / "launch.json")
    assert words in str(error.value)
    assert "launch.json" in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LaunchError, match=r"none\.json: No such file"):
        launches.read(tmp_path / "none.json")


# The kernel and its launch.


def test_missing_parameters_are_listed_with_an_example_of_each(folder):
    with pytest.raises(LaunchError) as error:
        described(folder, args={"a_ptr": "*bf16:16"})
    message = str(error.value)
    assert "5 of 7 parameters are missing" in message
    assert '"b_ptr": "*bf16:16"' in message
    assert '"k": "i32:16"' in message
    assert '"BLOCK": 128' in message
    assert "ACT" not in message, "it has a default"


def test_an_unknown_parameter_is_answered_with_the_nearest(folder):
    with pytest.raises(LaunchError, match=r"no 'BLOK'; did you mean 'BLOCK'\? There are: a_ptr, b"):
        described(folder, args={**ARGS, "BLOCK": 64, "BLOK": 3})


def test_a_constexpr_needs_a_constant(folder):
    with pytest.raises(LaunchError, match=r"BLOCK is tl\.constexpr in the kernel and 'i32'"):
        described(folder, args={**ARGS, "BLOCK": "i32"})


def test_a_name_that_is_not_in_the_file_is_answered_with_the_kernels_that_are(folder):
    with pytest.raises(LaunchError) as error:
        described(folder, "matmull")
    assert "'matmull' is not there; did you mean 'matmul'?" in str(error.value)
    assert "Kernels: matmul, tuned, rejected, paired, whole" in str(error.value)


def test_what_is_no_kernel_is_told_as_such(folder):
    with pytest.raises(LaunchError, match=r"'not_a_kernel' is no triton\.jit kernel"):
        described(folder, "not_a_kernel")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named"),
        ("x = 1\n1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_file_that_raises_on_import_is_told_in_its_words(tmp_path, text, words):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(LaunchError) as error:
        launches.load(f"{path}:kernel")
    assert f"{path} can't be imported: {words}" in str(error.value)
    assert "moelab capture" in str(error.value)


@pytest.mark.parametrize("kernel", ["kernel", ":kernel", "file.py:"])
def test_a_name_without_file_or_kernel_is_answered_with_the_form(kernel):
    with pytest.raises(LaunchError, match=r"expected FILE\.py:KERNEL"):
        launches.load(kernel)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(LaunchError, match="no such file"):
        launches.load(f"{tmp_path}/none.py:kernel")


def test_what_a_file_prints_stays_off_stdout(tmp_path, capsys):
    (tmp_path / "printing.py").write_text(MATMUL)
    launches.load(f"{tmp_path}/printing.py:matmul")
    assert capsys.readouterr() == ("", "imported\n")


def test_what_a_file_writes_past_python_stays_off_stdout_too(tmp_path, capfd):
    (tmp_path / "writing.py").write_text(
        "import os, subprocess\nos.write(1, b'written ')\n"
        "subprocess.run(['echo', 'by a child'])\n" + MATMUL
    )
    launches.load(f"{tmp_path}/writing.py:matmul")
    assert capfd.readouterr() == ("", "written by a child\nimported\n")


def test_a_package_that_another_one_hides_is_told(tmp_path):
    """Else the kernel of that name in the other package would be asked about."""
    package = tmp_path / "moelab" / "kernels"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "moe_gemm_a8w8.py").write_text(MATMUL)
    with pytest.raises(LaunchError, match="another package 'moelab' is imported already"):
        launches.load(f"{package}/moe_gemm_a8w8.py:matmul")


def test_a_files_name_may_have_dots(tmp_path):
    (tmp_path / "matmul.v2.py").write_text(MATMUL)
    assert launches.load(f"{tmp_path}/matmul.v2.py:matmul").arg_names[0] == "a_ptr"


def test_a_file_within_a_package_is_imported_as_part_of_it(tmp_path):
    package = tmp_path / "its_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helpers.py").write_text(MATMUL)
    (package / "kernels.py").write_text("from .helpers import matmul\n")
    by_file = launches.load(f"{package}/kernels.py:matmul")
    assert by_file is launches.load("its_package.kernels:matmul")


def test_files_of_the_same_name_are_kept_apart(tmp_path):
    for name, default in (("a", 16), ("b", 32)):
        (tmp_path / name).mkdir()
        text = MATMUL.replace('"none"', f'"{default}"')
        (tmp_path / name / "matmul.py").write_text(text)
    first, second = (launches.load(f"{tmp_path}/{name}/matmul.py:matmul") for name in "ab")
    assert (first.params[-1].default, second.params[-1].default) == ("16", "32")


def test_a_file_may_have_the_name_of_an_installed_module(tmp_path):
    """Without being taken for it, here or in a worker."""
    (tmp_path / "json.py").write_text(MATMUL)
    (tmp_path / "launch.json").write_text(json.dumps({"args": ARGS | {"BLOCK": 16}}))
    questions = plan.launches(
        f"{tmp_path}/json.py:matmul", tmp_path / "launch.json", targets="gfx950", stages=1
    )
    rows = sweep.run(questions, tmp_path / "rows", progress=False)
    assert list(rows["status"]) == ["ok"]
    assert str(tmp_path) not in sys.path


# The grid.


def test_stages_warps_async_copy_and_targets_are_multiplied(folder):
    grid = {"targets": "gfx950,sm_90", "stages": "1,2", "warps": "4,8", "async_copy": "both"}
    found = described(folder, **grid)
    assert len(found) == 2 * 2 * (2 + 1)
    assert {(q.num_warps, q.num_stages) for q in found} == {(4, 1), (4, 2), (8, 1), (8, 2)}


def test_what_is_not_given_is_the_launchs_or_tritons_default(folder):
    (own,) = described(folder, options={"num_warps": 2, "num_stages": 3, "waves_per_eu": 1})
    assert (own.num_warps, own.num_stages) == (2, 3)
    assert own.options == '{"waves_per_eu":1}'
    (default,) = described(folder)
    options = compiler.default_options(targets.get("gfx950"))
    assert (default.num_warps, default.num_stages) == (options["num_warps"], options["num_stages"])


def test_a_wrong_warp_count_is_answered_with_the_right_ones(folder):
    with pytest.raises(ParameterError, match="warps: 3 is not one of 1, 2, 4, 8, 16"):
        described(folder, warps=3)


def test_an_autotuned_kernel_is_asked_with_each_of_its_configurations(folder):
    found = described(folder, "tuned", args=ARGS)
    blocks = [(json.loads(q.args)["BLOCK"], q.num_stages, q.options) for q in found]
    tuned = '{"waves_per_eu":1}'
    assert blocks == [(32, 1, tuned), (32, 2, tuned), (64, 1, tuned), (64, 2, tuned)]


def test_stages_that_are_given_replace_the_autotuners(folder):
    found = described(folder, "tuned", args=ARGS, stages="3")
    assert [(json.loads(q.args)["BLOCK"], q.num_stages) for q in found] == [(32, 3), (64, 3)]


def test_an_autotuned_kernel_whose_launch_says_all_is_asked_once(folder):
    (found,) = described(folder, "tuned", args=ARGS | {"BLOCK": 16})
    assert json.loads(found.args)["BLOCK"] == 16


def test_an_autotuner_that_sets_no_parameter_is_asked_for_its_warps_and_stages(folder):
    found = described(folder, "whole")
    assert [(q.num_warps, q.num_stages) for q in found] == [(4, 1), (4, 2), (8, 1), (8, 2)]


def test_a_launchs_own_constant_stays_where_the_autotuner_sets_it_too(folder):
    found = described(folder, "named", args=ARGS | {"BLOCK": 16})
    own = [{name: json.loads(q.args).get(name) for name in ("BLOCK", "ACT")} for q in found]
    assert own == [{"BLOCK": 16, "ACT": {"const": "relu"}}, {"BLOCK": 16, "ACT": None}]


def test_an_autotuner_may_set_named_constants_and_types(folder):
    found = described(folder, "named", args=ARGS)
    own = [{name: json.loads(q.args).get(name) for name in ("BLOCK", "ACT")} for q in found]
    assert own == [{"BLOCK": 32, "ACT": {"const": "relu"}}, {"BLOCK": 64, "ACT": None}]
    (typed,) = described(folder, "typed", args={"pair": ["i32", "i64"], "out_ptr": "*fp32"})
    assert json.loads(typed.args)["KIND"] == {"dtype": "bf16"}


def test_what_an_autotuner_sets_and_a_launch_cannot_say_is_told(folder):
    with pytest.raises(LaunchError, match=r"triton\.autotune sets KIND to .*rejected"):
        described(folder, "calling", args={"pair": ["i32", "i64"], "out_ptr": "*fp32"})


def test_a_table_of_launches_tells_tuples_apart(folder):
    args = {"out_ptr": "*fp32", "KIND": {"dtype": "fp32"}}
    questions = [
        *described(folder, "paired", args={**args, "pair": ["i32", "i64"]}),
        *described(folder, "paired", args={**args, "pair": ["i32", "i32"]}),
    ]
    table = tables.of_launches(records.frame(sweep.settled(of).asked() for of in questions))
    assert list(table["pair"]) == [["i32", "i64"], ["i32", "i32"]]
    assert "KIND" not in table


# What the compiler says.


@pytest.mark.parametrize("target", ["gfx950", "gfx942", "sm_90"])
def test_a_described_launch_compiles_to_the_code_of_the_real_one(target):
    (configuration,) = plan.grid(
        kernels="moe_gemm_a8w8", targets=target, tiles="16x64x64", warps=4, stages=2, m=512
    )
    real = compiler.specialize(configuration)
    args = {}
    for index, (name, kind) in enumerate(real.ast.signature.items()):
        known = {attribute for attribute, _ in real.ast.attrs.get((index,), [])}
        if kind == "constexpr":
            value = real.ast.constants[(index,)]
            args[name] = {"const": value} if isinstance(value, str) else value
            continue
        large = kind.startswith("*") and target != "sm_90" and "tt.pointer_range" not in known
        args[name] = kind + ":16" * ("tt.divisibility" in known) + ":large" * large
    assert "*fp8e4b8:16:large" in args.values() or target != "gfx942", "w spans 8 GiB"
    source = kernels.load("moe_gemm_a8w8").source(
        configuration.problem, configuration.tile, targets.get(target)
    )
    described = KernelLaunch(
        "moelab.kernels.moe_gemm_a8w8:_moe_gemm_a8w8_kernel",
        json.dumps(args),
        json.dumps(source.options),
        4,
        2,
        "default",
        target,
    )
    assert compiler.frontend(compiler.specialize(described)) == compiler.frontend(real)
    assert compiler.specialize(described).options == real.options


def test_rows_say_what_was_asked_and_what_was_answered(folder, tmp_path):
    questions = [
        *described(folder, "tuned", args=ARGS, targets="gfx950,sm_90", async_copy="both"),
        *described(folder, "rejected", args={"x_ptr": "*i32", "BLOCK": 16}),
        *described(folder, args={**ARGS, "BLOCK": 256}, stages=4, targets="sm_90"),
        *described(
            folder,
            "paired",
            args={"pair": ["i32", "i64"], "out_ptr": "*fp32", "KIND": {"dtype": "fp32"}},
        ),
    ]
    rows = sweep.run(questions, tmp_path, progress=False)
    assert list(rows["kernel"]) == [question.kernel for question in questions]
    assert list(rows["args"]) == [question.args for question in questions]
    assert rows["model"].isna().all() and rows["block_m"].isna().all()
    tuned = rows[rows["kernel"].str.endswith(":tuned")]
    amd = tuned[tuned["target"] == "gfx950"]
    assert list(amd["status"]) == ["ok"] * 8, list(amd["reason"])
    assert amd["lds_bytes"].gt(0).all()
    # 64 x 64 bf16, twice, and async copy needs a buffer more at 2 stages.
    by = {(row.num_stages, row.async_copy): row.lds_bytes for row in amd.tail(4).itertuples()}
    assert by[2, False] == 2 * 64 * 64 * 2
    assert by[2, True] >= 2 * by[2, False]
    cuda = tuned[tuned["target"] == "sm_90"]
    assert set(cuda["status"]) == {"compile_error"}
    assert set(cuda["reason"]) == {"the cuda backend has no option waves_per_eu"}
    rejected = rows[rows["kernel"].str.endswith(":rejected")].iloc[0]
    assert rejected["status"] == "compile_error"
    assert "axis" in rejected["reason"]
    exceeding = rows[rows["args"].str.contains('"BLOCK":256')].iloc[0]
    assert exceeding["status"] == "out_of_lds"
    assert rows.iloc[-1]["status"] == "ok"


def test_an_option_of_no_backend_is_refused_with_those_there_are(folder, tmp_path):
    questions = described(folder, options={"waves_per_e": 1})
    with pytest.raises(LaunchError, match=r"options: no 'waves_per_e'; did you mean 'waves_per_eu"):
        sweep.run(questions, tmp_path, progress=False)


@pytest.mark.parametrize("value", [None, 1, True])
def test_a_text_is_not_taken_for_the_constant_that_it_spells(folder, value):
    args = ARGS | {"BLOCK": 16}
    constant, text = (
        compiler.specialize(described(folder, args=args | {"ACT": of})[0])
        for of in (value, {"const": str(value)})
    )
    assert constant.key != text.key and constant.ttir_key != text.ttir_key


def test_an_edited_kernel_is_asked_again(tmp_path):
    for text in (MATMUL, MATMUL.replace("acc += tl.dot(a, b)", "acc += tl.dot(a, b) * 2")):
        (tmp_path / "matmul.py").write_text(text)
        (tmp_path / "launch.json").write_text(json.dumps({"args": ARGS | {"BLOCK": 16}}))
        subprocess.run(
            [
                *(sys.executable, "-c", "from moelab.cli import app; app()", "lds"),
                *("matmul.py:matmul", "launch.json", "--target", "gfx950", "--stages", "1"),
            ],
            cwd=tmp_path,
            check=True,
        )
    assert records.read(tmp_path / "rows")["compile_key"].nunique() == 2

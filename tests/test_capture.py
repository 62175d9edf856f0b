"""Scripts and tests of others, run without a GPU: each launch told as the compiler tells it."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from moelab import answers, capture, cli, compiler
from moelab.specs import Configuration, Problem, Source, TensorSpec, Tile
from moelab.stand_in import recorder
from moelab.targets import TARGETS

README = Path(__file__).parents[1] / "README.md"

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def matmul(a, b, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    a += offs_m[:, None] * K + offs_k[None, :]
    b += offs_k[:, None] * N + offs_n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        acc += tl.dot(tl.load(a), tl.load(b))
        a += BK
        b += BK * N
    tl.store(c + offs_m[:, None] * N + offs_n[None, :], acc)


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y + offs, tl.load(x + offs, mask=offs < n), mask=offs < n)


@triton.jit
def wrong(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "no block is negative")
"""

SCRIPT = """
import torch, triton
from kernels import copy, matmul, wrong

x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
y = torch.empty_like(x)
out = torch.empty(256, 256, device="cuda")
assert x.is_cuda and x.device.type == "cuda" and torch.cuda.is_available()
assert torch.cuda.get_device_properties(0).gcnArchName.startswith("gfx950")

tile = 256, 256, 128
for stages in (1, 3, 4):
    matmul[lambda meta: (1,)](x, x, out, 256, 256, *tile, num_stages=stages, num_warps=8)  # stages

copy[(1,)](x, y, 256, BLOCK=256)  # aligned
copy[(1,)](x[1:], y, 256, BLOCK=256)  # view
copy[(1,)](x.view(-1)[1:], y, 256, BLOCK=256)  # odd
copy[(1,)](x, y, 255, BLOCK=256)  # indivisible
copy[(1,)](torch.empty(2**31, device="cuda", dtype=torch.bfloat16), y, 256, BLOCK=256)  # large

configs = [triton.Config({"BK": 128}, num_stages=s, num_warps=8) for s in (4, 3, 1)]
tuned = triton.autotune(configs, key=["N"])(matmul)
for _ in range(2):
    tuned[(1,)](x, x, out, 256, 256, BM=256, BN=256)  # tuned
guessed = triton.heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["n"])})(copy)
ms = triton.testing.do_bench(lambda: guessed[(1,)](x, y, 100))  # guessed
kernel = copy.warmup(torch.bfloat16, torch.bfloat16, 256, BLOCK=512, grid=(1,))  # warmup
assert kernel.n_regs > 0 and kernel.metadata.shared == 0
try:
    wrong[(1,)](x, BLOCK=16)  # wrong
except triton.CompilationError:
    pass
try:
    copy[(1,)](torch.zeros(256), y, 256, BLOCK=256)  # cpu
except ValueError as refused:
    print(refused)
for ask in (
    lambda: x.nonzero(),  # nonzero
    lambda: torch.zeros(256, 256).copy_(x),  # copied
    lambda: x.cpu().numpy(),  # numpy
):
    try:
        ask()
    except Exception as refused:
        print(refused)
assert torch.allclose(x, y)  # allclose
torch.testing.assert_close(x, y)  # assert_close
print("torch", torch.zeros(3).sum().item(), ms)
if out.sum().item() > 0:  # item
    copy[(1,)](x, y, 256, BLOCK=1024)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the kernels, to run commands in."""
    folder = tmp_path_factory.mktemp("captured")
    (folder / "kernels.py").write_text(KERNELS)
    return folder


def captured(folder, code, *command, name="script.py", target="gfx950", **options):
    """Capture a file, run as a script unless the command says how."""
    (folder / name).write_text(textwrap.dedent(code).lstrip("\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = command or ("python", name)
        return capture.run(command, target, progress=False, **options)


def place(name):
    """The script's line that ends in a name."""
    lines = SCRIPT.lstrip("\n").splitlines()
    (number,) = (n for n, line in enumerate(lines, start=1) if line.endswith(f"# {name}"))
    return f"script.py:{number}"


def at(found, *names):
    """Rows from lines of the script."""
    return [row for row in found.rows if row["launched_from"] in map(place, names)]


def statuses(found, name):
    return {row["num_stages"]: row["status"] for row in at(found, name)}


@pytest.fixture(scope="module")
def script(folder):
    return captured(folder, SCRIPT)


# What is told of launches.


def test_each_launch_is_told_with_its_line(script):
    assert statuses(script, "stages") == {1: "ok", 3: "out_of_lds", 4: "out_of_lds"}
    assert {row["kernel"] for row in at(script, "stages")} == {"kernels:matmul"}
    assert [row["launches"] for row in at(script, "stages")] == [1, 1, 1]
    assert {row["lds_limit"] for row in at(script, "stages")} == {163_840}


def bound(folder, n=256, elements=256 * 256, **changed):
    """What moelab itself makes of the script's call of `copy`."""
    spec = importlib.util.spec_from_file_location("kernels", folder / "kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    tensor = TensorSpec((elements,), "bf16")
    args = {"x": tensor, "y": TensorSpec((256 * 256,), "bf16"), "n": n, "BLOCK": 256} | changed
    return compiler.specialize_source(
        Source(kernels.copy, args, {}), {"num_warps": 4}, TARGETS["gfx950"], None
    )


class Odd(TensorSpec):
    """A tensor that starts one element into its storage."""

    def data_ptr(self):
        return 2


def test_a_launch_is_specialized_as_the_gpu_would_have_it(folder, script, tmp_path):
    """Divisibility by 16, and the 2 GiB that AMD's buffer loads reach."""
    kept = keep(folder, tmp_path, "script.py")
    for name, launch in {
        "aligned": bound(folder),
        "view": bound(folder),
        "odd": bound(folder, x=Odd((256 * 256,), "bf16")),
        "indivisible": bound(folder, n=255),
        "large": bound(folder, elements=2**31),
    }.items():
        assert kept[place(name)]["ir"] == compiler.frontend(launch).text, name
    texts = {kept[place(name)]["ir"] for name in ("aligned", "odd", "indivisible", "large")}
    assert len(texts) == 4, "each of the four differs from the others"


def keep(folder, where, name):
    """Run a script captured, without compiling; give the last launch of each line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        capture._run(["python", name], "gfx950", where)
    launches = {}
    for event in capture._events(where):
        if event["event"] == "launch":
            text = (where / f"{event['keys'][-1]}.launch").read_text()
            launches[event["from"]] = json.loads(text)
    return launches


def test_equal_launches_are_counted(script):
    assert [row["launches"] for row in at(script, "aligned")] == [1]
    assert {row["lds_bytes"] for row in at(script, "aligned", "view", "odd")} == {0}


def test_of_an_autotuners_configurations_the_first_that_fits_is_launched(script):
    rows = at(script, "tuned")
    assert {row["num_stages"]: row["launches"] for row in rows} == {4: 0, 3: 0, 1: 2}
    assert statuses(script, "tuned") == {4: "out_of_lds", 3: "out_of_lds", 1: "ok"}
    assert {row["configs"] for row in rows} == {3}
    assert not set(map(id, rows)) & set(map(id, script.unfit)), "the autotuner passes them over"


def test_heuristics_benchmarks_and_warmups_are_followed(script):
    assert [row["launches"] for row in at(script, "guessed")] == [1]
    assert [row["launches"] for row in at(script, "warmup")] == [0], "compiled, not launched"


WAYS = """
import torch
from kernels import copy
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.tools.tensor_descriptor import TensorDescriptor
import triton, triton.language as tl

def run(x, block):
    y = torch.empty(x.shape, device="cuda")
    copy[(1,)](x, y, x.numel(), BLOCK=block)
    return y

operator = torch.library.custom_op("ways::operator", mutates_args=())
@operator
def operator(x: torch.Tensor) -> torch.Tensor:
    return run(x, 16)
operator.register_fake(torch.empty_like)

library = torch.library.Library("library", "DEF")
library.define("operator(Tensor x) -> Tensor")
library.impl("operator", lambda x: run(x, 32), "CUDA")

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return run(x, 64)
    @staticmethod
    def backward(ctx, grad):
        return run(grad, 128)

@triton.jit
def described(d, out):
    offs = tl.arange(0, 32)
    tl.store(out + offs[:, None] * 64 + offs[None, :], d.load([0, 0]))

@gluon.jit
def in_gluon(x):
    offs = gl.arange(0, 256, layout=gl.BlockedLayout([1], [64], [4], [0]))
    gl.store(x + offs, gl.load(x + offs))

x = torch.nn.Linear(64, 64).to("cuda").weight
operator(x)
torch.ops.library.operator(x)
Function.apply(x * 2).sum().backward()
assert x.grad.device == x.device
labels = torch.zeros(64, dtype=torch.long, device=x.device)
torch.nn.functional.cross_entropy(x, labels, reduction="none").sum().backward()
described[(1,)](TensorDescriptor.from_tensor(x.detach(), [32, 32]), x)
in_gluon[(1,)](x)
with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode(), torch.device("cuda"):
    torch.compile(lambda: run(torch.zeros(4), 256))()
torch.cuda.synchronize()
"""


def test_launches_are_found_wherever_they_are_made(folder):
    """In operators, backward passes and Gluon, with descriptors, on streams."""
    found = captured(folder, WAYS, name="ways.py")
    assert [row["status"] for row in found.rows] == ["ok"] * 7
    launched = [row["kernel"].partition(":")[2] for row in found.rows]
    assert sorted(launched) == ["copy"] * 5 + ["described", "in_gluon"]


THREADS = """
import sys, threading, torch
from concurrent.futures import ThreadPoolExecutor
from kernels import copy

def step(i):
    weight = torch.randn(64, 64, device="cuda", requires_grad=True)
    y = torch.nn.functional.layer_norm(weight, (64,)).softmax(-1)
    copy[(1,)](y, y, 64, BLOCK=16 << i % 2)
    (y * 2).sum().backward()
    assert weight.grad.is_cuda

class Worker(threading.Thread):
    def run(self):
        step(0)
        torch.zeros(1, device="cuda").item()

sys.setswitchinterval(1e-5)
with ThreadPoolExecutor(4) as pool:
    list(pool.map(step, range(16)))
worker = Worker()
worker.start()
worker.join()
batches = torch.utils.data.DataLoader(
    torch.zeros(4, 4), batch_size=2, num_workers=1, pin_memory=True
)
for batch in batches:
    batch.cuda(non_blocking=True)
"""


def test_threads_launch_like_the_one_that_started_them(folder):
    found = captured(folder, THREADS, name="threads.py")
    assert sorted(row["launches"] for row in found.launched) == [8, 9]
    assert {row["launched_from"] for row in found.launched} == {"threads.py:8"}
    untold = [(row["status"], row["launched_from"]) for row in found.rows if not row["kernel"]]
    assert untold == [("not_captured", "threads.py:15"), ("stopped", "threads.py:15")]
    assert found.exit_code == 0


def test_what_the_frontend_rejects_has_its_words(script):
    (row,) = at(script, "wrong")
    assert (row["status"], row["launches"]) == ("compile_error", 1)
    assert "no block is negative" in row["reason"]


def test_what_only_a_gpu_can_tell_is_listed_with_its_line(script):
    untold = {
        (row["status"], row["launched_from"]): row["reason"]
        for row in script.rows
        if row["kernel"] is None
    }
    assert untold == {
        ("not_captured", place("nonzero")): "a shape depends on values (nonzero)",
        ("not_captured", place("copied")): "values were copied to the CPU (copy_)",
        ("not_captured", place("numpy")): "values were read (numpy)",
        ("not_captured", place("allclose")): "a comparison (torch.allclose)",
        ("not_captured", place("assert_close")): "a comparison (torch.testing.assert_close)",
        ("not_captured", place("item")): "values were read (item)",
        ("stopped", place("item")): ("NotCaptured: values were read (item): only a GPU could tell"),
    }
    assert script.exit_code == 1


ASKS = """
import copy, io, pickle, numpy, torch

x = torch.zeros((), device="cuda")
print(f"{x}", copy.copy(x).device, torch.cuda.memory_summary(), torch.cuda.initial_seed())
assert not torch.cuda.is_current_stream_capturing()
with torch.cuda.nvtx.range("a range"), torch.profiler.profile(
    activities=[torch.profiler.ProfilerActivity.CUDA]
):
    x + 1
for ask in (
    lambda: f"{x:.3f}",
    lambda: torch.save({"x": x}, io.BytesIO()),
    lambda: pickle.dumps(x),
    lambda: numpy.testing.assert_allclose(x.cpu(), 0),
    lambda: torch.nn.GRU(8, 8).cuda()(torch.zeros(8, 8, device="cuda")),
):
    try:
        ask()
    except Exception:
        pass
"""


def test_what_stops_for_want_of_a_gpu_is_no_error_of_the_script(folder):
    found = captured(folder, ASKS, name="asks.py")
    assert found.exit_code == 0
    assert [(row["launched_from"], row["reason"].partition(" (")[0]) for row in found.rows] == [
        ("asks.py:11", "values were read"),
        ("asks.py:12", "values were read"),
        ("asks.py:13", "values were read"),
        ("asks.py:14", "values were read"),
        ("asks.py:15", "an operator has no shape function"),
    ]


def test_a_tensor_of_the_cpu_is_refused_as_by_the_driver(script):
    assert at(script, "cpu") == []


def test_the_switch_is_one_for_all_launches(folder, script):
    code = """
    import torch
    from kernels import matmul
    x = torch.empty(256, 256, device="cuda", dtype=torch.bfloat16)
    matmul[(1,)](x, x, x.float(), 256, 256, 256, 256, 128, num_stages=3, num_warps=8)
    """
    (row,) = captured(folder, code, name="switch.py", async_copy="off").rows
    (default,) = (row for row in at(script, "stages") if row["num_stages"] == 3)
    assert default["async_copy"] == compiler.default_async_copy(TARGETS["gfx950"])
    assert row["async_copy"] is False
    assert (row["lds_bytes"] < default["lds_bytes"]) == default["async_copy"]


# Our own kernels, as their launchers call them.

OURS = """
import torch
from moelab.kernels import formats, router
from moelab.kernels.epilogue import SwiGLU
from moelab.kernels.moe_gemm_a8w4 import moe_gemm_a8w4
from moelab.specs import Tile

tile = Tile(128, 256, 256)
x, x_scale = formats.quantize_mxfp8(torch.randn(512, 1024, device="cuda"))
w, w_scale = formats.quantize_mxfp4(torch.randn(4, 512, 1024, device="cuda"))
routing = router.route_logits(torch.randn(512, 4, device="cuda"), 2, tile.block_m)
for stages in (1, 2, 3):
    moe_gemm_a8w4(
        x, w, x_scale, w_scale, routing, tile,
        swiglu=SwiGLU(), num_warps=8, num_stages=stages,
    )
"""


def test_our_own_launchers_take_the_lds_that_a_sweep_tells(folder):
    problem = Problem(
        model="test",
        layer=1,
        tp=1,
        m=512,
        experts=4,
        top_k=2,
        n=512,
        k=1024,
        gather=True,
        swiglu=True,
        weighted=False,
        bias=False,
        x_format="mxfp8",
    )
    told = {}
    for stages in (1, 2, 3):
        configuration = Configuration(
            "moe_gemm_a8w4", problem, Tile(128, 256, 256), 8, stages, True, "gfx950"
        )
        answer = answers.answer(configuration, "lds")
        told[stages] = (answer["lds_bytes"], answer["status"])
    assert len(set(told.values())) == 3, "or the comparison says nothing"
    found = captured(folder, OURS, name="ours.py", async_copy="on")
    assert told == {
        row["num_stages"]: (row["lds_bytes"], row["status"])
        for row in found.launched
        if row["kernel"] == "moelab.kernels.moe_gemm_a8w4:_moe_gemm_a8w4_kernel"
    }


# What becomes of tests, errors and crashes.

TESTS = """
import pytest, torch
from kernels import copy, matmul

def launch(**options):
    x = torch.empty(256, 256, device="cuda", dtype=torch.bfloat16)
    matmul[(1,)](x, x, x.float(), 256, 256, 256, 256, 128, num_warps=8, **options)
    return x

@pytest.mark.parametrize("stages", [1, 2])
def test_passes(stages):
    torch.testing.assert_close(launch(num_stages=stages), torch.zeros(256, 256))

def test_fails():
    launch(num_stages=1)
    assert 1 == 2

def test_reads_back():
    assert launch(num_stages=1).abs().max() < 1

def test_skips():
    pytest.skip("for a reason")
"""


def test_launches_and_ends_are_told_by_test(folder):
    found = captured(
        folder, TESTS, "pytest", "-q", "-p", "no:cacheprovider", "test_it.py", name="test_it.py"
    )
    by_stages = {row["num_stages"]: row for row in found.launched}
    assert by_stages[1]["launches"] == 3
    assert sorted(by_stages[1]["tests"]) == [
        "test_it.py::test_fails",
        "test_it.py::test_passes[1]",
        "test_it.py::test_reads_back",
    ]
    assert by_stages[2]["tests"] == ["test_it.py::test_passes[2]"]
    ends = {row["status"]: row for row in found.rows if row["status"] in ("stopped", "failed")}
    assert ends["stopped"]["tests"] == ["test_it.py::test_reads_back"]
    assert ends["failed"]["tests"] == ["test_it.py::test_fails"]
    assert "assert 1 == 2" in ends["failed"]["reason"]
    assert found.exit_code == 1


def test_what_a_crash_left_is_told(folder):
    code = """
    import os, signal, subprocess, sys, torch
    from kernels import copy
    x = torch.empty(256, device="cuda")
    copy[(1,)](x, x, 256, BLOCK=256)
    if not os.fork():
        copy[(1,)](x, x, 256, BLOCK=512)
        os._exit(0)
    os.wait()
    os.kill(os.getpid(), signal.SIGSEGV)
    """
    found = captured(folder, code, name="crash.py")
    assert found.exit_code == -11
    assert [row["launched_from"] for row in found.launched] == ["crash.py:4", "crash.py:6"]


def test_who_ends_the_capture_ends_the_command_and_is_told_what_it_did(folder, tmp_path):
    code = """
    import os, signal, time, torch
    from kernels import copy
    x = torch.empty(256, device="cuda")
    copy[(1,)](x, x, 256, BLOCK=256)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
    """
    (folder / "ended.py").write_text(textwrap.dedent(code))
    command = [sys.executable, "-c", "from moelab.cli import app; app()", "capture"]
    found = subprocess.run(
        [*command, "--target", "gfx950", "--json", "--", "python", "ended.py"],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 3, found.stderr
    assert json.loads(found.stdout)["launched_from"] == "ended.py:5"
    assert f"ended with {-signal.SIGTERM}" in found.stderr
    assert list(tmp_path.glob("moelab-capture-*")) == []


def test_an_error_of_the_script_is_its_own(folder):
    found = captured(folder, "import json\njson.loads('{')\n", name="raises.py")
    (row,) = found.rows
    assert (row["status"], row["launched_from"]) == ("failed", "raises.py:2")
    assert row["reason"].startswith("JSONDecodeError")


# The command.


def invoked(*arguments):
    return CliRunner().invoke(cli.app, ["capture", "--target", "gfx950", *arguments])


def test_the_exit_code_says_whether_all_fits(monkeypatch, script):
    told = {"rows": script.rows, "exit_code": 0, "run_s": 1.0, "compile_s": 1.0}
    fitting = [row for row in script.rows if row["status"] == "ok"]
    for rows, code in ((script.rows, 1), (fitting, 0), ([], 3)):
        found = capture.Capture(**told | {"rows": rows})
        monkeypatch.setattr(capture, "run", lambda *_, found=found, **__: found)
        assert invoked("--", "python", "script.py").exit_code == code
    died = capture.Capture(**told | {"rows": fitting, "exit_code": -11})
    monkeypatch.setattr(capture, "run", lambda *_, **__: died)
    assert invoked("--", "python", "script.py").exit_code == 3, "it would have launched more"
    assert invoked().exit_code == 2, "there is no command"


def test_rows_are_json_a_table_and_parquet(monkeypatch, script, tmp_path):
    import pandas as pd

    monkeypatch.setattr(capture, "run", lambda *_, **__: script)
    lines = invoked("--json", "--export", str(tmp_path / "rows.parquet"), "--", "x").stdout
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == len(script.rows)
    assert set(rows[0]) == set(capture.COLUMNS)
    assert pd.read_parquet(tmp_path / "rows.parquet")["lds_bytes"].max() > 163_840
    table = invoked("--", "x")
    assert table.stdout.split("out_of_lds")[0].count("matmul") == 1, "what does not fit comes first"
    assert f"2 at {place('stages')} (out_of_lds)" in table.stderr


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        (["no-such-program"], {}, "no-such-program"),
        (["python"], {"target": "gfx951"}, "gfx950"),
        (["python"], {"async_copy": "both"}, "on, off or default"),
        (["python"], {"target": "sm_90", "async_copy": "on"}, "no such switch"),
    ],
)
def test_wrong_use_says_what_would_do(command, options, words):
    with pytest.raises((ValueError, capture.CaptureError), match=words):
        capture.run(command, options.pop("target", "gfx950"), **options)


def test_another_triton_is_refused():
    kept = {"key": {"triton": "2.1.0"}}
    with pytest.raises(capture.CaptureError, match=r"2\.1\.0.*install moelab"):
        capture._answers(kept, "default", 1, 1, False)


def test_a_torn_line_is_passed_over(tmp_path):
    (tmp_path / "1.events").write_bytes(b'{"event": "launch"}\n{"event": "lau')
    assert list(capture._events(tmp_path)) == [{"event": "launch"}]


def test_the_place_of_a_launch_is_nobodys_library():
    recorder.start(os.getcwd())
    shown, sys.excepthook = sys.excepthook, sys.__excepthook__
    assert shown is not sys.excepthook
    assert recorder.here().startswith("tests/test_capture.py:")


# Against a GPU.

# Runs a script as it is and writes down each kernel that was loaded.
LOADED = """
import json, runpy, sys
from triton.compiler.compiler import CompiledKernel

loaded, load = [], CompiledKernel._init_handles


def note(kernel):
    if kernel.module is None:
        of = kernel.metadata
        loaded.append([of.name, of.num_warps, of.num_stages, of.shared])
    load(kernel)


CompiledKernel._init_handles = note
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
finally:
    open(sys.argv[0], "w").write(json.dumps(loaded))
"""


@pytest.mark.gpu
def test_what_is_told_of_a_script_is_what_a_gpu_loads_for_it(folder):
    import torch

    chip = torch.cuda.get_device_properties(0)
    # On NVIDIA's, too, there is a gcnArchName.
    target = f"sm_{chip.major}{chip.minor}"
    if torch.version.hip:
        target = chip.gcnArchName.partition(":")[0]
    (script,) = re.findall(r"```python\n([^`]*reduce_top_k.*?)```", README.read_text(), re.DOTALL)
    found = captured(folder, script, sys.executable, "layer.py", name="layer.py", target=target)
    assert found.exit_code == 0
    (folder / "loaded.py").write_text(LOADED)
    command = [sys.executable, "loaded.py", "loaded.json", "layer.py"]
    subprocess.run(command, cwd=folder, check=True)
    loaded = json.loads((folder / "loaded.json").read_text())
    told = [
        [row["kernel"].rpartition(":")[2], row["num_warps"], row["num_stages"], row["lds_bytes"]]
        for row in found.launched
    ]
    assert sorted(told) == sorted(loaded)
    assert len(told) >= 5

"""A launch without a tile takes the tuned one; what is given wins, and what is old is said."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton
from grouped_gemm import PLAIN, Recorder, every_kernel, make, spread
from triton.runtime.errors import OutOfResources

from moelab import problems, tuned
from moelab.kernels import grouped_gemm, load, mxfp4_hopper, source_hash
from moelab.specs import Tile

TILE = Tile(16, 32, 64)
# 3 tokens, each to 2 of 4 experts.
SHAPE = {"experts": 4, "top_k": 2, "n": 64, "k": 128, "gather": True}


@pytest.fixture
def recorder(kernel, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(load(kernel), f"_{kernel}_kernel", recorder)
    return recorder


@pytest.fixture
def tuned_folder(tmp_path, monkeypatch):
    """A target of which nothing is known but what a test saves."""
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "nothing")
    monkeypatch.setenv("MOELAB_TUNED", str(tmp_path))
    monkeypatch.setattr(grouped_gemm, "target_name", lambda device: "sm_90")
    grouped_gemm._warn_if_stale.cache_clear()
    grouped_gemm._REFUSED.clear()
    tuned.forget()
    yield tmp_path
    tuned.forget()


def save(kernel, *, tile=TILE, source=None, **changed):
    """Keep a choice for the problem of `case`: 2 warps and 3 stages."""
    shape = tuned.Shape(kernel, **SHAPE)._asdict() | changed
    row = shape | vars(tile)
    row |= {"m": 3, "of": "", "num_warps": 2, "num_stages": 3, "time_us": 1.0, "low_us": 1.0}
    row |= {"high_us": 1.0, "runner_up_us": None, "compared": 1}
    row |= {"made_by": {"source": source or source_hash(kernel)}}
    tuned.save([row], "sm_90", tuned.path_of("sm_90"))


def case(kernel, generator, tile=TILE, **options):
    expert = spread(generator, m=3, experts=SHAPE["experts"], top_k=SHAPE["top_k"])
    given = {"experts": SHAPE["experts"], "n": SHAPE["n"], "k": SHAPE["k"]} | options
    return make(kernel, generator, expert, tile, swiglu=PLAIN, **given)


def launched(recorder):
    """What a launch was made with: blocks, warps, stages."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return tuple(recorder.arguments[name] for name in names)


@every_kernel
def test_a_launch_without_a_tile_has_the_tuned_one(kernel, generator, recorder, tuned_folder):
    save(kernel)
    case(kernel, generator).run(None)
    assert launched(recorder) == (16, 32, 64, 2, 3)


@every_kernel
def test_and_gives_the_result_that_it_gives_with_that_tile(
    kernel, device, device_generator, monkeypatch, tuned_folder
):
    save(kernel)
    of = case(kernel, device_generator)
    assert torch.equal(of.run(None), of.run(TILE, num_warps=2, num_stages=3))


@every_kernel
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_stages": 1}, (16, 32, 64, 2, 1)),
        ({"num_warps": 4}, (16, 32, 64, 4, 3)),
        ({"num_warps": 1, "num_stages": 2}, (16, 32, 64, 1, 2)),
    ],
)
def test_given_warps_and_stages_win(kernel, given, expected, generator, recorder, tuned_folder):
    save(kernel)
    case(kernel, generator).run(None, **given)
    assert launched(recorder) == expected


@every_kernel
def test_a_given_tile_has_the_schedule_of_before(kernel, generator, recorder, tuned_folder):
    save(kernel)
    case(kernel, generator).run(Tile(16, 64, 128))
    assert launched(recorder) == (16, 64, 128, 8, 2)


@every_kernel
def test_a_routing_for_another_block_m_is_told_the_tuned_one(
    kernel, generator, recorder, tuned_folder
):
    save(kernel)
    of = case(kernel, generator, Tile(32, 32, 64))
    with pytest.raises(ValueError, match=r"block_m = 32; .* with 16: route with 16"):
        of.run(None)
    assert recorder.arguments is None


@every_kernel
def test_what_is_no_routing_is_shown(kernel, generator, recorder, tuned_folder):
    of = case(kernel, generator)
    with pytest.raises(ValueError, match="routing is a NoneType"):
        load(kernel).__dict__[kernel](*of.tensors, None, **of.own)


def another(kernel):
    """Options of a launch whose shape differs from the one that was saved, by what differs."""
    options = {"y_format": {"y_format": "fp32"}}
    if kernel == "moe_gemm_a8w8":
        options["fast_accum"] = {"fast_accum": True}
    return options


@every_kernel
def test_another_shape_takes_the_published_tile(kernel, generator, recorder, tuned_folder):
    save(kernel)
    of = case(kernel, generator)
    for given in another(kernel).values():
        of.run(None, **given)
        problem = problems.problem("Qwen3-235B-A22B", 1, 1, 3)
        tile, num_warps = problems.ruled_tile(kernel, problem, block_m=16)
        assert launched(recorder)[2:4] == (tile.block_k, num_warps)
        assert recorder.arguments["num_stages"] == tuned.MOST_STAGES


def test_mxfp8_and_shuffled_scales_are_shapes_of_their_own(generator, monkeypatch, tuned_folder):
    kernel, recorder = "moe_gemm_a8w4", Recorder()
    monkeypatch.setattr(load(kernel), f"_{kernel}_kernel", recorder)
    save(kernel, x_format="mxfp8")
    case(kernel, generator, x_format="mxfp8").run(None)
    assert launched(recorder) == (16, 32, 64, 2, 3)
    case(kernel, generator).run(None)
    assert launched(recorder) != (16, 32, 64, 2, 3)


class Refusing(Recorder):
    """Stand in for a kernel that fits up to a stage count, and count the attempts."""

    def __init__(self, most):
        super().__init__()
        self.most, self.asked = most, []

    def __call__(self, *_, **arguments):
        self.asked.append(arguments["num_stages"])
        if arguments["num_stages"] > self.most:
            raise OutOfResources(2, 1, "shared memory")
        self.arguments = arguments


@every_kernel
@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_the_published_tile_has_as_many_stages_as_fit(
    kernel, most, generator, monkeypatch, tuned_folder
):
    refusing = Refusing(most)
    monkeypatch.setattr(load(kernel), f"_{kernel}_kernel", refusing)
    of = case(kernel, generator)
    of.run(None)
    assert refusing.arguments["num_stages"] == min(most, tuned.MOST_STAGES)
    refusing.asked.clear()
    of.run(None)
    assert refusing.asked == [min(most, tuned.MOST_STAGES)], "what is refused is asked once"


class RefusingWide(Recorder):
    """Stand in for a kernel whose tile fits up to a width, with whatever stages."""

    def __init__(self, most):
        super().__init__()
        self.most, self.asked = most, 0

    def __call__(self, *_, **arguments):
        self.asked += 1
        if arguments["BLOCK_N"] > self.most:
            raise OutOfResources(2, 1, "shared memory")
        self.arguments = arguments


@every_kernel
def test_a_published_tile_that_does_not_fit_at_all_is_halved(
    kernel, generator, monkeypatch, tuned_folder
):
    of = case(kernel, generator, Tile(128, 32, 64))
    name, recorder = f"_{kernel}_kernel", Recorder()
    monkeypatch.setattr(load(kernel), name, recorder)
    of.run(None)
    half = launched(recorder)[1] // 2
    grouped_gemm._REFUSED.clear()
    refusing = RefusingWide(half)
    monkeypatch.setattr(load(kernel), name, refusing)
    of.run(None)
    assert launched(refusing)[1] == half
    assert refusing.arguments["num_stages"] == tuned.MOST_STAGES
    refusing.asked = 0
    of.run(None)
    assert refusing.asked == 1, "what is refused is asked once"


@every_kernel
def test_a_tile_of_which_nothing_fits_is_refused_as_triton_does(
    kernel, generator, monkeypatch, tuned_folder
):
    monkeypatch.setattr(load(kernel), f"_{kernel}_kernel", Refusing(0))
    with pytest.raises(OutOfResources):
        case(kernel, generator).run(None)


@pytest.mark.gpu
@every_kernel
def test_what_a_gpu_refuses_is_stepped_down_from_and_the_result_is_right(
    kernel, device_generator, tuned_folder
):
    of = case(kernel, device_generator, Tile(128, 32, 64))
    of.check(of.run(None))
    (refused,) = grouped_gemm._REFUSED.values()
    assert refused > 0 or kernel == "moe_gemm_a8w8_blockscale"


@every_kernel
def test_a_kernel_that_changed_since_is_said_once_and_its_choice_used(
    kernel, generator, recorder, tuned_folder
):
    save(kernel, source="another")
    of = case(kernel, generator)
    with pytest.warns(UserWarning, match=f"{kernel} changed since it was tuned on sm_90"):
        of.run(None)
    assert launched(recorder) == (16, 32, 64, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of.run(None)


@every_kernel
def test_a_kernel_that_is_as_it_was_is_no_warning(kernel, generator, recorder, tuned_folder):
    save(kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case(kernel, generator).run(None)


@every_kernel
def test_the_warning_points_at_the_line_that_launches(kernel, generator, recorder, tuned_folder):
    save(kernel, source="another")
    of = case(kernel, generator)
    with pytest.warns(UserWarning) as said:
        getattr(load(kernel), kernel)(*of.tensors, of.routing, swiglu=PLAIN, **of.own)
    assert said[0].filename == __file__


@pytest.mark.parametrize("kernel", ["moe_gemm_a8w4", "moe_gemm_a4w4"])
def test_weights_laid_out_for_hopper_are_tuned_and_warned_of_alike(
    kernel, generator, monkeypatch, tuned_folder
):
    recorder, tile = Recorder(), Tile(16, 64, 128)
    monkeypatch.setattr(mxfp4_hopper, "_mxfp4_hopper_kernel", recorder)
    monkeypatch.setattr(mxfp4_hopper, "target_name", lambda device: "sm_90")
    monkeypatch.setattr(mxfp4_hopper, "ready_x", lambda x, x_scale, k: (x, x_scale))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    save(kernel, tile=tile, source="another", scale_layout="hopper")
    of = case(kernel, generator, tile, scale_layout="hopper")
    with pytest.warns(UserWarning, match=f"{kernel} changed") as said:
        getattr(load(kernel), kernel)(*of.tensors, of.routing, num_warps=4, **of.own)
    assert said[0].filename == __file__
    assert launched(recorder) == (16, 64, 128, 4, 3)


# What counts as the kernel's source.


def another_finish(acc):
    return acc


@every_kernel
def test_a_source_counts_the_helpers_that_a_kernel_calls(kernel, monkeypatch):
    before = source_hash.__wrapped__(kernel)
    monkeypatch.setattr(load(kernel).finish, "fn", another_finish)
    assert source_hash.__wrapped__(kernel) != before


def test_comments_and_blank_lines_are_no_change():
    from moelab.kernels import _without_comments

    bare = "def f(x):\n    return x + 1\n"
    commented = "    def f(x):  # of x\n\n        # one more\n        return x + 1\n"
    assert _without_comments(commented) == _without_comments(bare)
    assert _without_comments(bare) != _without_comments(bare.replace("+ 1", "+ 2"))

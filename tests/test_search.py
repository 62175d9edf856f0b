"""The neighbourhood of a configuration, and what of it is proposed."""

import json

import pytest

from moelab import plan, records, search, specs
from moelab.parameters import ParameterError
from moelab.specs import KernelLaunch


def grid(**changed):
    small = {"kernels": "moe_gemm_a8w8", "targets": "gfx950", "tiles": "16x64x64", "warps": 4}
    return plan.grid(**small | changed)


(SEED,) = plan.grid(
    kernels="moe_gemm_a8w4",
    targets="gfx950",
    tiles="128x512x256",
    warps=8,
    stages=2,
    async_copy="on",
)


def differs(configuration, base=SEED):
    """What a configuration changes of another."""
    return {name: to for name, to in configuration.settings.items() if to != base.settings[name]}


def test_the_neighbours_of_the_seed_are_the_changes_that_people_try():
    found = [differs(c) for c in search.alternatives(SEED)]
    for wanted in (
        {"num_stages": 1},
        {"block_k": 128},
        {"block_k": 64},
        {"block_n": 256},
        {"block_m": 64},
        {"num_warps": 4},
        {"num_warps": 16},
        {"async_copy": False},
        {"num_stages": 1, "block_k": 512},
        {"num_stages": 3, "block_k": 128},
        {"block_k": 128, "async_copy": False},
    ):
        assert wanted in found


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_a_neighbour_differs_in_one_setting_or_two_and_is_there_once(stages):
    (base,) = grid(kernels="moe_gemm_a8w4", tiles="128x512x256", warps=8, stages=stages)
    found = search.alternatives(base)
    assert len(found) == len(set(found)) <= 60
    for configuration in found:
        assert 1 <= len(differs(configuration, base)) <= 2
        assert (configuration.problem, configuration.target) == (base.problem, base.target)
        assert configuration.num_stages >= 1


def test_every_single_change_comes_before_those_as_far_in_two():
    found = [differs(c) for c in search.alternatives(SEED)]
    assert found.index({"block_k": 64}) < found.index({"num_stages": 1, "block_k": 128})
    near, far = {"num_stages": 1, "block_k": 128}, {"block_k": 64, "block_n": 256}
    assert found.index(near) < found.index(far)


def test_what_asks_for_more_lds_is_paid_for_by_the_other_half_of_a_step():
    for changes in map(differs, search.alternatives(SEED)):
        deeper = changes.get("num_stages", 0) > SEED.num_stages
        longer = changes.get("block_k", 0) > SEED.tile.block_k
        if len(changes) == 2 and (deeper or longer):
            assert set(changes) == {"num_stages", "block_k"}
            assert deeper != longer


def test_the_furthest_are_left_out_first():
    assert search.alternatives(SEED, most=7) == search.alternatives(SEED)[:7]


def test_what_is_kept_stays():
    found = search.alternatives(SEED, ["async_copy", "block_m"])
    changed = {name for c in found for name in differs(c)}
    assert changed == {*specs.SETTINGS} - {"async_copy", "block_m"}


@pytest.mark.parametrize("keep", ["blockk", ["block_n", "blockk"]])
def test_what_is_kept_must_be_something_that_changes(keep, tmp_path):
    with pytest.raises(ParameterError, match=r"did you mean 'block_k'.*num_stages, block_k"):
        next(search.propose([SEED], tmp_path, keep=keep))


@pytest.mark.parametrize("base", [grid(targets="sm_90", stages=2), grid(async_copy="off")])
def test_async_copy_is_not_touched_where_it_is_off_or_has_no_switch(base):
    assert not any("async_copy" in differs(c, base[0]) for c in search.alternatives(base[0]))


def test_no_block_gets_smaller_than_what_matrix_units_multiply_and_none_of_split_k_changes():
    (base,) = grid(tiles="8x32x32/4", kernels="fused_gemm_afp4wfp4_a16w16", stages=1)
    for configuration in search.alternatives(base):
        changes = differs(configuration, base)
        assert all(changes.get(name, 16) >= 16 for name in ("block_m", "block_n", "block_k"))
        assert "block_m" not in changes
        assert configuration.tile.split_k == 4


# Of anybody's kernel.


def launch(**args):
    return KernelLaunch("a.py:b", specs.compact(args), "{}", 8, 2, True, "gfx950")


def test_constants_that_are_called_as_blocks_are_varied_with_the_rest():
    of = launch(x="*bf16:16", BLOCK_M=128, BLOCK_SIZE_N=256, block_k=64, BLOCK=32)
    assert of.settings == {
        "num_stages": 2,
        "block_k": 64,
        "block_n": 256,
        "block_m": 128,
        "num_warps": 8,
        "async_copy": True,
    }
    changed = of.with_settings(block_n=128, num_stages=1)
    assert json.loads(changed.args) == json.loads(of.args) | {"BLOCK_SIZE_N": 128}
    assert (changed.num_stages, changed.num_warps) == (1, 8)
    assert of.asked()["split_k"] == 1, "with all three blocks it has a tile"


def test_what_is_no_block_is_left_alone():
    for args in ({"BLOCK": 64}, {"BLOCK_K": "i32"}, {"BLOCK_Q": 64}, {"BLOCK_M": True}):
        assert set(launch(**args).settings) == {"num_stages", "num_warps", "async_copy"}


KERNEL = """
import triton
import triton.language as tl


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, k, stride, M: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_K: tl.constexpr):
    rows, columns, steps = tl.arange(0, M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * stride + (start + steps)[None, :])
        b = tl.load(b_ptr + (start + steps)[:, None] * stride + columns[None, :])
        acc += tl.dot(a, b)
    tl.store(c_ptr + rows[:, None] * stride + columns[None, :], acc)
"""


def test_what_fits_instead_of_anybodys_kernel_is_compiled_and_the_nearest_comes_first(tmp_path):
    (tmp_path / "matmul.py").write_text(KERNEL)
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*bf16:16")
    constants = {"k": "i32:16", "stride": "i32:16", "M": 64, "BLOCK_N": 128, "BLOCK_K": 128}
    (tmp_path / "launch.json").write_text(json.dumps({"args": pointers | constants}))
    asked = plan.launches(
        f"{tmp_path}/matmul.py:matmul",
        tmp_path / "launch.json",
        targets="gfx942",
        stages=3,
        warps=4,
        async_copy="off",
    )
    ((base, ranked),) = search.propose(asked, tmp_path / "rows", keep=["num_warps"], top=30)
    # Two copies of 64 x 128 and of 128 x 128, in bf16.
    assert (base["status"], base["lds_bytes"]) == ("out_of_lds", 2 * 2 * 128 * (64 + 128))
    assert list(ranked["changed"][:2]) == ["stages 3 -> 2", "block_k 128 -> 64"]
    # One stage fits, too, and overlaps nothing: it is the last resort.
    assert "stages 3 -> 1" in set(ranked["changed"])
    stages = list(ranked["num_stages"][ranked["spilled_registers"] == 0])
    assert stages == sorted(stages, key=lambda stage: stage == 1)
    assert set(ranked["ordered_by"]) == {"nearness"}
    assert set(ranked["status"]) == {"ok"} and set(ranked["mode"]) == {"full"}
    assert ranked["lds_bytes"].le(65_536).all()
    kept = records.read(tmp_path / "rows")
    assert set(ranked["compile_key"]) <= set(kept[kept["mode"] == "full"]["compile_key"])

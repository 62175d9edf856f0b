"""Rows in, files out: named, keyed and refused as the engines' loaders read them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from moelab import exports, kernels, problems, records, targets
from moelab.cli import app
from moelab.exports import ExportError
from moelab.specs import Tile

QWEN, DEEPSEEK, GPT = "Qwen3-235B-A22B", "DeepSeek-R1", "GPT-OSS 120B"


def row(m=512, stages=1, layer=1, lds_bytes=1000, *, model=QWEN, tp=4, tile=None, **changed):
    """A row that fits, of the published tile if none is given."""
    problem = problems.problem(model, layer, tp, m)
    kernel = changed.get("kernel", "moe_gemm_a8w8")
    published, num_warps = problems.ruled_tile(kernel, problem)
    return {
        "kernel": kernel,
        **asdict(problem),
        "target": "gfx950",
        "triton": "3.9.0",
        **asdict(tile or published),
        "num_warps": num_warps,
        "num_stages": stages,
        "async_copy": True,
        "status": "ok",
        "lds_bytes": lds_bytes,
        "lds_limit": 163_840,
        **changed,
    }


def both(*arguments, **changed):
    """The same of layers 1 and 2."""
    return [row(*arguments, layer=layer, **changed) for layer in (1, 2)]


def frame(*rows):
    return records.frame(rows)


def refused(**changed):
    return {"status": "out_of_lds", "lds_bytes": 200_000, **changed}


def nearest(file, m):
    """What vLLM and SGLang launch m tokens with: every key is a number, the nearest wins."""
    found = json.loads(file.text)
    found.pop("triton_version", None)
    configs = {int(key): value for key, value in found.items()}
    return configs[min(configs, key=lambda key: abs(key - m))]


# The choice.


def chosen(*rows):
    of_one = exports.choose(frame(*rows))
    return None if of_one.empty else tuple(of_one.iloc[0][exports.CONFIGURATION])


def test_the_most_stages_that_fit_are_chosen():
    rows = [row(stages=1), row(stages=2, lds_bytes=2000), row(stages=3, **refused())]
    assert chosen(*rows)[-1] == 2


def test_what_one_row_refuses_is_not_chosen_for_any():
    rows = [*both(512, 1), row(512, 2, 1), row(512, 2, 2, **refused())]
    assert chosen(*rows)[-1] == 1


@pytest.mark.parametrize("status", [name for name in records.STATUSES if name != "ok"])
def test_no_row_that_is_not_ok_is_chosen(status):
    assert chosen(row(status=status, lds_bytes=None)) is None


def test_nothing_is_chosen_from_nothing():
    assert chosen() is None


def test_the_published_tile_comes_before_more_stages_and_before_a_larger_one():
    larger = Tile(128, 256, 256)
    assert chosen(row(stages=1), row(stages=3, tile=larger))[:3] == (32, 256, 256)


def test_without_the_published_tile_more_stages_come_first_then_the_larger_tile():
    small, large = Tile(32, 64, 128), Tile(32, 128, 128)
    assert chosen(row(stages=2, tile=small), row(stages=1, tile=large))[1] == 64
    assert chosen(row(stages=2, tile=small), row(stages=2, tile=large))[1] == 128


def test_of_equal_tiles_the_one_with_the_least_lds_is_chosen():
    tile = Tile(32, 128, 128)
    warps = [row(tile=tile, num_warps=count, lds_bytes=lds) for count, lds in ((2, 9), (4, 8))]
    assert chosen(*warps)[-2] == chosen(*reversed(warps))[-2] == 4
    warps = [one | {"lds_bytes": 17 - one["lds_bytes"]} for one in warps]
    assert chosen(*warps)[-2] == chosen(*reversed(warps))[-2] == 2


def test_what_serves_more_problems_comes_before_what_is_published_for_one():
    tile = Tile(32, 128, 128)
    rows = [row(512), *(row(m, tile=tile) for m in (512, 1536))]
    assert chosen(*rows)[1] == 128


# vLLM.


def test_vllm_finds_each_kernel_by_its_name():
    rows = frame(
        *both(),
        *both(model=DEEPSEEK, tp=8, kernel="moe_gemm_a8w8_blockscale"),
    )
    assert [str(file.path) for file in exports.vllm(rows)] == [
        "E=128,N=384,device_name=AMD_Instinct_MI355X,dtype=fp8_w8a8.json",
        "E=256,N=256,device_name=AMD_Instinct_MI355X,dtype=fp8_w8a8,block_shape=[128,128].json",
    ]


def test_vllm_names_every_h200_alike_and_sglang_does_not():
    rows = frame(*both(target="sm_90", async_copy=None))
    (file,) = exports.vllm(rows, "NVIDIA H200 NVL")
    assert ",device_name=NVIDIA_H200,dtype" in file.path.name
    up, _ = exports.sglang(rows, "NVIDIA H200 NVL")
    assert ",device_name=NVIDIA_H200_NVL,dtype" in up.path.name


def test_vllm_reads_every_key_but_the_version_as_a_number_and_takes_the_nearest():
    (file,) = exports.vllm(frame(*both(512, 2), *both(8704, 1)))
    assert json.loads(file.text)["triton_version"] == "3.9.0"
    assert nearest(file, 1)["num_stages"] == 2
    assert nearest(file, 100_000)["num_stages"] == 1


COMMON = ["BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"]


@pytest.mark.parametrize(
    ("target", "async_copy", "own"),
    [("gfx950", True, ["waves_per_eu", "matrix_instr_nonkdim", "kpack"]), ("sm_90", None, [])],
)
@pytest.mark.parametrize("spell", [exports.vllm, exports.sglang])
def test_an_entry_has_what_the_launch_takes_and_nothing_else(spell, target, async_copy, own):
    for file in spell(frame(*both(target=target, async_copy=async_copy))):
        entry = nearest(file, 512)
        assert list(entry) == COMMON + own
        assert all(type(value) is int for value in entry.values())


@pytest.mark.parametrize("kernel", exports.FORMATS["aiter"])
@pytest.mark.parametrize("target", ["gfx950", "sm_90"])
def test_the_options_are_those_that_the_rows_were_compiled_with(kernel, target):
    problem = problems.problem(DEEPSEEK, 1, 8, 512)
    tile, _ = problems.ruled_tile(kernel, problem)
    source = kernels.load(kernel).source(problem, tile, targets.get(target))
    assert exports.launch_options(kernel, targets.get(target)) == source.options
    assert source.args["GROUP_M"] == Tile.group_m


def test_vllm_launches_both_layers_with_an_entry_so_both_must_fit():
    rows = [*both(512, 1), row(1536, layer=1), *both(2560, 1)]
    rows += [row(2560, 2, 1), row(2560, 2, 2, **refused())]
    (file,) = exports.vllm(frame(*rows))
    assert list(file.entries) == ["512", "2560"] and list(file.left_out) == ["1536"]
    assert nearest(file, 2560)["num_stages"] == 1


def test_what_only_one_layer_was_compiled_with_is_no_entry():
    other = Tile(32, 64, 256)
    rows = frame(row(512, layer=1), row(512, layer=2, tile=other), *both(1536))
    (file,) = exports.vllm(rows)
    assert list(file.left_out) == ["512"] and "512" not in json.loads(file.text)


@pytest.mark.parametrize("spell", [exports.vllm, exports.sglang])
def test_rows_of_one_layer_alone_make_no_file(spell):
    with pytest.raises(ExportError, match="--layer all"):
        spell(frame(row()))


# SGLang.


def test_sglang_finds_both_layers_in_a_folder_of_its_triton():
    rows = frame(*both(model=DEEPSEEK, tp=8, kernel="moe_gemm_a8w8_blockscale"))
    stem = "E=256,N=256,device_name=AMD_Instinct_MI355X,dtype=fp8_w8a8,block_shape=[128, 128]"
    assert [str(file.path) for file in exports.sglang(rows)] == [
        f"configs/triton_3_9_0/{stem}.json",
        f"configs/triton_3_9_0/{stem}_down.json",
    ]


@pytest.mark.parametrize("triton", ["3.6.0", "3.6.0+rocm7.0.0.gitabc", "3.6.0.post1"])
def test_sglangs_folder_is_numbers_whatever_follows_tritons_version(triton):
    up, _ = exports.sglang(frame(*both(triton=triton)))
    assert up.path.parent.name == "triton_3_6_0"


def test_sglang_reads_every_key_as_a_number():
    for file in exports.sglang(frame(*both(512), *both(1536))):
        assert [int(key) for key in json.loads(file.text)] == [512, 1536]


def test_sglangs_layers_share_block_m_under_every_number_of_tokens():
    # Alone, the second layer would take the published tile.
    of_512 = [row(layer=1, tile=Tile(64, 256, 256)), row(layer=2)]
    up, down = exports.sglang(
        frame(*of_512, row(layer=2, tile=Tile(64, 128, 256)), *both(1536, tile=Tile(16, 64, 256)))
    )
    assert nearest(down, 512)["BLOCK_SIZE_N"] == 128
    for m in (1, 512, 1100, 1536, 9999):
        assert nearest(up, m)["BLOCK_SIZE_M"] == nearest(down, m)["BLOCK_SIZE_M"]


def test_tokens_without_a_shared_block_m_are_in_neither_file():
    rows = [row(512), row(512, layer=2, tile=Tile(64, 256, 256)), *both(1536)]
    for file in exports.sglang(frame(*rows)):
        assert list(json.loads(file.text)) == ["1536"] and list(file.left_out) == ["512"]


# aiter.


def test_aiter_looks_a_launch_of_a8w4_up_by_block_m_n_and_k():
    rows = frame(*both(model=GPT, tp=1, kernel="moe_gemm_a8w4"))
    (file,) = exports.aiter(rows)
    assert str(file.path) == "moe/gfx950-A8W4.json"
    found = json.loads(file.text)
    assert list(found) == ["bm16_n2880_k2880", "bm16_n5760_k2880"]
    own = ["waves_per_eu", "matrix_instr_nonkdim", "kpack"]
    assert list(found["bm16_n5760_k2880"]) == [
        *("BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps", "num_stages"),
        *own,
    ]


def test_a_launch_that_never_fits_is_left_out():
    rows = [row(model=GPT, tp=1, kernel="moe_gemm_a8w4")]
    rows.append(row(layer=2, model=GPT, tp=1, kernel="moe_gemm_a8w4", **refused()))
    (file,) = exports.aiter(frame(*rows))
    assert list(file.left_out) == ["bm16_n2880_k2880"]


@pytest.mark.parametrize("medium", [256, 1023])
def test_aiters_fused_moe_needs_all_three_numbers_of_tokens(medium):
    table, buckets = exports.aiter(frame(row(255, 3), row(medium, 2), row(1024, 1)))
    assert str(buckets.path) == "moe/gfx950-MOE-FP8_W8A8.json"
    stages = {name: entry["num_stages"] for name, entry in json.loads(buckets.text).items()}
    assert stages == {"small_M": 3, "medium_M": 2, "large_M": 1}
    (table,) = exports.aiter(frame(row(512), row(1024)))
    assert "small_M" in table.left_out["gfx950-MOE-FP8_W8A8.json"]


def test_what_aiter_decides_in_code_is_a_table():
    (table,) = exports.aiter(
        frame(*both(model=DEEPSEEK, tp=8, kernel="moe_gemm_a8w8_blockscale", stages=2))
    )
    assert str(table.path) == "moe/gfx950-A8W8_BLOCKSCALE.md"
    head, _, first, second = table.text.splitlines()
    cells = dict(zip(head.split(" | "), first.split(" | "), strict=True))
    assert (cells["| block_m"], cells["N"], cells["K"]) == ("| 16", "512", "7168")
    assert (cells["BLOCK_SIZE_N"], cells["num_stages"]) == ("256", "2")
    assert second.startswith("| 16 | 7168 | 256 |")


@pytest.mark.parametrize(
    ("target", "kernel", "said"),
    [("sm_90", "moe_gemm_a8w8", "vllm or sglang"), ("gfx1250", "moe_gemm_a8w4", "Gluon")],
)
def test_what_aiter_has_no_such_kernel_for_is_refused(target, kernel, said):
    with pytest.raises(ExportError, match=said):
        exports.aiter(frame(row(target=target, kernel=kernel)))


# Wrong use.


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ([], {}, "none at all"),
        ([row()], {"target": "sm_90"}, "gfx950"),
        ([row() | {"model": "test_moe_gemm_a8w8"}], {}, "of a model's layers .* none at all"),
        ([row(kernel="moe_gemm_a4w4")], {}, "moe_gemm_a8w8_blockscale"),
        ([row()], {"kernel": ["moe_gemm_a4w4"]}, "no place for moe_gemm_a4w4"),
        ([row()], {"model": ["GPT"]}, QWEN),
        ([row()], {"tp": ["8"]}, "there are 4"),
        ([row(), row(triton="3.6.0")], {}, "--triton"),
        ([row(), row(async_copy=False)], {}, "off, on; choose one with --async-copy"),
        ([row(), row(y_format="mxfp8")], {}, "--y-format"),
    ],
)
def test_rows_that_do_not_say_what_to_export_are_refused(rows, given, said):
    given = {"target": "gfx950", **given}
    with pytest.raises(ExportError, match=said):
        exports.select(frame(*rows), "vllm", **given)


def test_rows_of_other_kernels_targets_and_tests_are_left_out():
    others = [row(kernel="moe_gemm_a4w4"), row(target="gfx942"), row() | {"model": "a test"}]
    assert len(exports.select(frame(row(), *others), "vllm", "gfx950")) == 1


def test_of_a_kernel_that_has_changed_the_last_answer_counts():
    before = row() | {"compile_key": "before", "status": "out_of_lds", "lds_bytes": 999_999}
    found = exports.select(frame(before, row() | {"compile_key": "since"}), "vllm", "gfx950")
    assert list(found["status"]) == ["ok"]


def test_one_kind_of_rows_can_be_asked_for():
    rows = frame(row(), row(async_copy=False), row(async_copy=False, tp=8))
    (kept,) = exports.select(
        rows, "vllm", "gfx950", async_copy=["off"], tp=["4"], x_format=["none"]
    ).to_dict("records")
    assert (kept["async_copy"], kept["tp"]) == (False, 4)


def test_a_gpu_without_a_known_name_is_asked_for():
    rows = frame(*both(target="gfx1100", async_copy=None))
    with pytest.raises(ExportError, match="--device-name"):
        exports.vllm(rows)
    (file,) = exports.vllm(rows, "AMD_Radeon_RX7900XTX")
    assert "RX7900XTX" in file.path.name


def test_known_names_are_of_targets_and_of_the_first_chip():
    for target, name in exports.DEVICE_NAMES.items():
        model = targets.get(target).chips[0].split()
        assert all(word in name for word in model if word not in ("SXM", "80GB")), (target, name)


# Writing.


ROWS = frame(*both(512), *both(1536))


def write(out, rows=ROWS, **changed):
    return exports.write(exports.vllm(rows), rows, out, source="rows", **changed)


def there(out):
    return {path: path.read_text() for path in out.rglob("*") if path.is_file()}


def test_beside_each_file_lies_where_it_comes_from(tmp_path):
    (path,) = write(tmp_path)
    beside = json.loads(path.with_suffix(".provenance.json").read_text())
    assert beside["rule"].startswith("chosen by fit, not measured")
    assert "can differ" in beside["caution"]
    assert {name: beside[name] for name in ("rows", "target", "triton", "async_copy")} == {
        "rows": "rows",
        "target": "gfx950",
        "triton": "3.9.0",
        "async_copy": "on",
    }
    assert beside["lds_limit_bytes"] == 163_840
    assert beside["entries"]["512"] == {
        "kernel": "moe_gemm_a8w8",
        "models": [QWEN],
        "layers": [1, 2],
        "tp": [4],
        "m": [512],
        "lds_bytes": 1000,
    }
    assert len(there(tmp_path)) == 2, "nothing unfinished is left"


def test_the_most_lds_of_an_entrys_problems_is_told(tmp_path):
    (file,) = exports.vllm(frame(row(lds_bytes=10), row(layer=2, lds_bytes=20)))
    assert file.entries["512"]["lds_bytes"] == 20


def test_writing_the_same_again_changes_nothing_whatever_the_day(tmp_path):
    write(tmp_path)
    for path, text in there(tmp_path).items():
        path.write_text(text.replace('"date": "20', '"date": "19'))
    write(tmp_path)


def test_a_file_that_differs_stays_and_nothing_else_is_written_unless_forced(tmp_path):
    write(tmp_path)
    before = there(tmp_path)
    more = frame(*both(512, 2), *both(512, tp=8))
    with pytest.raises(ExportError, match=r"N=384.*(.|\n)*--force"):
        write(tmp_path, more)
    assert there(tmp_path) == before
    assert len(write(tmp_path, more, force=True)) == 2
    assert len(there(tmp_path)) == 4


# The command.


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture
def store(tmp_path):
    with records.Journal(tmp_path / "rows") as journal:
        for one in [*both(512), row(1536)]:
            journal.append(one | {"schema": records.SCHEMA_VERSION})
    return tmp_path / "rows"


def given(store, **changed):
    options = {"format": "vllm", "target": "gfx950", "rows": store, "out": store.parent / "out"}
    return [
        part
        for name, value in (options | changed).items()
        for part in ("--" + name.replace("_", "-"), value)
    ]


def test_the_command_prints_the_files_and_says_on_stderr_what_is_left_out(store):
    result = run(*given(store))
    assert result.exit_code == 0, result.output
    (path,) = result.stdout.splitlines()
    assert json.loads(Path(path).read_text())["512"]
    assert "left out: 1536" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("format", "trtllm", "vllm"),
        ("target", "gfx95", "gfx950"),
        ("target", "sm_90", "those there are on: gfx950"),
        ("rows", "nowhere", "no rows there"),
        ("kernel", "moe_gemm_a4w4", "it takes moe_gemm_a8w8"),
        ("model", "GPT", QWEN),
        ("tp", "2", "there are 4"),
        ("triton", "3.6.0", "there are 3.9.0"),
        ("async_copy", "off", "there are on"),
    ],
)
def test_wrong_use_exits_2_with_what_is_right_and_writes_nothing(store, option, value, said):
    result = run(*given(store, **{option: value}))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert said in " ".join(result.stderr.split())
    assert not (store.parent / "out").exists()


def test_a_file_in_the_way_exits_2_and_force_replaces_it(store):
    assert run(*given(store)).exit_code == 0
    (path, *_) = (store.parent / "out").glob("*8.json")
    path.write_text("{}")
    result = run(*given(store))
    assert result.exit_code == 2 and "--force" in result.stderr and path.read_text() == "{}"
    assert run(*given(store), "--force").exit_code == 0
    assert json.loads(path.read_text())["512"]


def test_aiter_names_no_device(store):
    result = run(*given(store, format="aiter", device_name="MI355X"))
    assert result.exit_code == 2 and "--device-name" in result.stderr

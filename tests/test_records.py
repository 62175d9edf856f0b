"""Rows on disk: what is written is read back, and what is broken is said."""

import json
import math
import os
import subprocess
import sys
import time
import warnings

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from moelab import records
from moelab.records import Journal

ROW = {
    "kernel": "moe_gemm_a8w8",
    "model": "Llama4 Maverick",
    "layer": 1,
    "tp": 1,
    "m": 512,
    "experts": 128,
    "top_k": 1,
    "n": 16384,
    "k": 5120,
    "gather": True,
    "swiglu": True,
    "weighted": False,
    "bias": True,
    "scatter": False,
    "x_format": "mxfp8",
    "y_format": "bf16",
    "scale_layout": "cdna4",
    "n_bf16": 0,
    "fast_accum": True,
    "args": '{"k": "i32:16"}',
    "options": '{"waves_per_eu": 1}',
    "target": "gfx950",
    "triton": "3.9.0",
    "block_m": 16,
    "block_n": 64,
    "block_k": 64,
    "split_k": 7,
    "group_m": 8,
    "tma": True,
    "tails": 2,
    "persistent": True,
    "specialized": True,
    "num_warps": 4,
    "num_stages": 2,
    "async_copy": True,
    "mode": "full",
    "compile_key": "0123456789abcdef",
    "gpu": "NVIDIA H200",
    "workload": "uniform, 0",
    "run": "20261123T170000-abcdef",
    "side": "base",
    "peer": "triton_kernels",
    "includes": "gather",
    "status": "ok",
    "reason": None,
    "lds_bytes": 10304,
    "lds_limit": 163840,
    "tmem_columns": 0,
    "method": "full",
    "buffers": "[]",
    "registers": 26,
    "scalar_registers": 46,
    "spilled_registers": 0,
    "scratch_bytes": 0,
    "code_bytes": 3136,
    "workgroups_per_cu": 8,
    "warps_per_simd": 7.5,
    "occupancy_limit": "warps",
    "time_us": 12.5,
    "time_low_us": 12.25,
    "time_high_us": 12.75,
    "both_layers_us": 20.5,
    "tflops": 700.5,
    "roof_tflops": 1400.5,
    "samples_us": "[[12.5], [12.25]]",
    "largest_error": 0.001,
    "loaded_lds_bytes": 10304,
    "clock_mhz": 1980.0,
    "temperature_c": 40.0,
    "throttled": "power",
    "made_by": '{"torch": "2.11.0"}',
    "moelab": "0.1.0",
    "schema": 6,
}

# What rows of earlier schemas meant, which had no columns for it.
UNSAID_IN_5 = {"side": None}
UNSAID_IN_4 = {
    **UNSAID_IN_5,
    "fast_accum": False,
    "group_m": 4,
    "tma": False,
    "tails": 0,
    "persistent": False,
    "specialized": False,
    **dict.fromkeys(("peer", "includes", "both_layers_us", "throttled")),
}
UNSAID_IN_3 = UNSAID_IN_4 | dict.fromkeys(
    (
        *("gpu", "workload", "run", "time_us", "time_low_us", "time_high_us", "tflops"),
        *("roof_tflops", "samples_us", "largest_error", "loaded_lds_bytes", "clock_mhz"),
        *("temperature_c", "made_by"),
    )
)
UNSAID_IN_2 = {"args": None, "options": None, "buffers": None, **UNSAID_IN_3}
UNSAID = {
    1: {
        "scatter": False,
        "x_format": None,
        "y_format": "bf16",
        "scale_layout": "rows",
        "n_bf16": 0,
        "split_k": 1,
        **UNSAID_IN_2,
    },
    2: UNSAID_IN_2,
    3: UNSAID_IN_3,
    4: UNSAID_IN_4,
    5: UNSAID_IN_5,
}
OLD_ROW = {
    schema: {name: value for name, value in ROW.items() if name not in unsaid} | {"schema": schema}
    for schema, unsaid in UNSAID.items()
}
every_schema = pytest.mark.parametrize("schema", UNSAID)


def write(store, *rows):
    with Journal(store) as journal:
        for row in rows:
            journal.append(row)
    return journal.path


def test_the_example_row_has_every_column():
    assert tuple(ROW) == tuple(records.COLUMNS)


def plain(rows):
    """Rows as they are written: what is missing is None."""
    return [
        {name: None if value is pd.NA else value for name, value in row.items()}
        for row in rows.to_dict("records")
    ]


# Round trips.


def test_what_was_appended_is_read_back(tmp_path):
    write(tmp_path, ROW)
    assert plain(records.read(tmp_path)) == [ROW]


def test_missing_figures_come_back_missing_and_not_as_zero(tmp_path):
    missing = {"async_copy": None, "lds_bytes": None, "warps_per_simd": math.nan, "reason": None}
    write(tmp_path, ROW | missing)
    row = records.read(tmp_path).iloc[0]
    assert {name for name in records.COLUMNS if row[name] is pd.NA} == set(missing)


def test_nan_is_written_as_json_has_it(tmp_path):
    path = write(tmp_path, ROW | {"warps_per_simd": math.nan})
    assert "NaN" not in path.read_text()
    assert json.loads(path.read_text())["warps_per_simd"] is None


def test_text_of_a_compiler_survives(tmp_path):
    reason = 'line 1\r\n\tline 2\x1b[31m "quoted" \u2028 ünï ∞'
    write(tmp_path, ROW | {"reason": reason}, ROW | {"m": 1536})
    assert records.read(tmp_path)["reason"].iloc[0] == reason


@pytest.mark.parametrize("rows", [[], [ROW], [ROW | {"async_copy": None, "registers": None}]])
def test_columns_are_typed_whatever_is_in_them(tmp_path, rows):
    write(tmp_path, *rows)
    found = records.read(tmp_path)
    assert {name: str(found[name].dtype) for name in found} == records.COLUMNS
    assert list(found) == list(records.COLUMNS)
    assert len(found) == len(rows)


def test_columns_that_a_row_lacks_are_missing_and_others_are_left_out(tmp_path):
    write(tmp_path, {"kernel": "moe_gemm_a8w8", "status": "ok", "schema": 2, "colour": "blue"})
    (row,) = plain(records.read(tmp_path))
    assert (row["kernel"], row["status"]) == ("moe_gemm_a8w8", "ok")
    assert row["model"] is row["lds_bytes"] is row["async_copy"] is None
    assert "colour" not in row


def test_a_line_that_is_json_but_no_row_is_left_out(tmp_path):
    write(tmp_path, ROW, {"kernel": "moe_gemm_a8w8"})
    with pytest.warns(UserWarning, match=r"jsonl:2 is not a row: .*; left out"):
        assert len(records.read(tmp_path)) == 1


def test_of_rows_with_the_same_key_the_last_stays(tmp_path):
    write(tmp_path, ROW | {"status": "crashed"}, ROW | {"m": 1536}, ROW)
    found = records.read(tmp_path)
    assert found[["m", "status"]].to_dict("list") == {"m": [512, 1536], "status": ["ok", "ok"]}


def test_of_two_writers_one_after_the_other_the_last_wins(tmp_path):
    # Ten, so that names in any other order than time's would hardly pass.
    for lds_bytes in range(10):
        write(tmp_path, ROW | {"lds_bytes": lds_bytes})
    assert list(records.read(tmp_path)["lds_bytes"]) == [9]


@pytest.mark.parametrize("name", records.KEY)
def test_everything_that_is_asked_tells_rows_apart(name):
    assert records.key(ROW) != records.key(ROW | {name: "another"})


def test_nothing_that_is_answered_tells_rows_apart():
    answers = {name: "another" for name in records.COLUMNS if name not in records.KEY}
    assert "lds_bytes" in answers
    assert records.key(ROW) == records.key(ROW | answers)


# Rows of earlier schemas.


@every_schema
def test_an_earlier_row_reads_as_what_it_meant(tmp_path, schema):
    write(tmp_path, OLD_ROW[schema])
    assert plain(records.read(tmp_path)) == [ROW | UNSAID[schema] | {"schema": schema}]


@every_schema
def test_an_earlier_row_answers_the_same_question_now(tmp_path, schema):
    write(tmp_path, OLD_ROW[schema])
    (row,) = records.journalled(tmp_path)
    assert records.key(row) == records.key(ROW | UNSAID[schema])
    write(tmp_path, ROW | UNSAID[schema], ROW)
    assert [row["schema"] for row in plain(records.read(tmp_path))] == [6, 6]


@every_schema
def test_an_earlier_export_reads_as_what_it_meant(tmp_path, schema):
    path = tmp_path / "rows.parquet"
    records.export(records.frame([OLD_ROW[schema]]).drop(columns=list(UNSAID[schema])), path)
    assert plain(records.read(path)) == [ROW | UNSAID[schema] | {"schema": schema}]


def test_rows_of_all_schemas_are_exported_together(tmp_path):
    write(tmp_path / "store", *OLD_ROW.values(), ROW)
    rows = records.read(tmp_path / "store")
    assert_frame_equal(records.read(records.export(rows, tmp_path / "rows.parquet")), rows)
    assert list(rows["schema"]) == [1, 2, 3, 4, 5, 6]


# Writers.


def test_two_writers_share_a_store_line_by_line(tmp_path):
    with Journal(tmp_path) as one, Journal(tmp_path) as other:
        for m in range(20):
            (one if m % 2 else other).append(ROW | {"m": m})
        assert one.path != other.path
        # What is written can be read at once, before the writer is done.
        assert sorted(records.read(tmp_path)["m"]) == list(range(20))


def test_a_writer_without_rows_leaves_no_file(tmp_path):
    write(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_store_that_cannot_be_made_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Journal(tmp_path / "file")


def test_rows_appended_together_are_read_back_in_order(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append(*(ROW | {"m": m} for m in range(5)))
    assert list(records.read(tmp_path)["m"]) == list(range(5))


def test_a_line_is_json_whatever_else_it_is(tmp_path):
    line = write(tmp_path, ROW).read_text()
    row = json.loads(line)
    assert {name: row[name] for name in ROW} == ROW
    assert line.count("\n") == 1


def test_a_later_writer_wins_though_the_clock_was_set_back(tmp_path, monkeypatch):
    for hours, lds_bytes in ((0, 1), (-1, 2), (-2, 3), (5, 4), (-100_000, 5)):
        now = time.time_ns() + hours * 3_600_000_000_000
        monkeypatch.setattr(records.time, "time_ns", lambda now=now: now)
        write(tmp_path, ROW | {"lds_bytes": lds_bytes})
        assert list(records.read(tmp_path)["lds_bytes"]) == [lds_bytes]
        monkeypatch.undo()


def test_a_folder_that_cannot_be_written_to_is_refused_before_a_row_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError) as error:
        Journal(tmp_path)
    assert str(error.value) == f"{tmp_path}: rows can't be written there; choose another store"


# Broken and foreign files.


def test_a_torn_last_line_is_left_out_and_named_and_the_others_are_kept(tmp_path):
    path = write(tmp_path, ROW, ROW | {"m": 1536}, ROW | {"m": 2560})
    path.write_bytes(path.read_bytes()[:-40])
    other = write(tmp_path, ROW | {"m": 3584})
    with pytest.warns(UserWarning) as warned:
        found = records.read(tmp_path)
    assert sorted(found["m"]) == [512, 1536, 3584]
    assert [str(w.message) for w in warned] == [
        f"{path}:3 is not a row: the line is torn or damaged; left out"
    ]
    assert other != path


@pytest.mark.parametrize(
    "line", [b"", b"{", b"\x00\x00\x00\x00", b"\xff\xfe{}", b"null", b"12", b'["kernel"]', b"text"]
)
def test_a_line_that_is_no_row_is_left_out_wherever_it_is(tmp_path, line):
    path = write(tmp_path, ROW)
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.warns(UserWarning, match=r"\.jsonl:1 is not a row"):
        assert len(records.read(tmp_path)) == 1


def test_a_line_without_its_checksum_is_a_row_of_an_earlier_schema_alone(tmp_path):
    path = tmp_path / "rows-1.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(OLD_ROW[4]) + "\n")
    with pytest.warns(UserWarning, match=r"rows-1.jsonl:1 is not the row that was written"):
        assert list(records.read(tmp_path)["schema"]) == [4]


def test_a_damaged_line_is_set_aside_once_and_stays_where_it_was(tmp_path):
    path = write(tmp_path, ROW, ROW | {"m": 1536}, ROW | {"m": 2560})
    damaged = path.read_bytes().replace(b"1536", b"1537")[:-9]
    path.write_bytes(damaged)
    with pytest.warns(UserWarning) as warned:
        list(records.journalled(tmp_path, aside=True))
    aside = path.with_name(f"{path.name}.damaged")
    assert [str(w.message) for w in warned] == [
        f"{path}:2 is not the row that was written: its checksum is another; "
        f"set aside in {aside.name}",
        f"{path}:3 is not a row: the line is torn or damaged; set aside in {aside.name}",
    ]
    assert path.read_bytes() == damaged
    assert aside.read_bytes().splitlines() == damaged.splitlines()[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(records.journalled(tmp_path, aside=True))
        assert list(records.read(tmp_path)["m"]) == [512]


def test_a_line_that_was_half_written_when_set_aside_is_a_row_when_it_is_whole(tmp_path):
    path = write(tmp_path, ROW, ROW | {"m": 1536})
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.warns(UserWarning, match="set aside"):
        list(records.journalled(tmp_path, aside=True))
    path.write_bytes(whole)
    assert list(records.read(tmp_path)["m"]) == [512, 1536]


def test_rows_of_a_later_moelab_are_refused_with_what_to_do(tmp_path):
    path = write(tmp_path, ROW, ROW | {"schema": 99})
    with pytest.raises(ValueError) as error:
        records.read(tmp_path)
    assert f"{path}:2 has schema 99" in str(error.value)
    assert "upgrade moelab, or choose another store" in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.parquet"])
def test_nothing_at_a_path_says_what_would_be(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        records.read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "a store's folder or a .parquet export" in str(error.value)


def test_other_files_in_a_store_are_not_read(tmp_path):
    write(tmp_path, ROW)
    (tmp_path / "notes.txt").write_text("not a row")
    assert len(records.read(tmp_path)) == 1


# Frames.


@pytest.mark.parametrize("count", range(6))
def test_a_frame_that_is_made_in_parts_is_the_same(monkeypatch, count):
    rows = [ROW | {"m": m, "lds_bytes": None if m % 2 else m, "moelab": None} for m in range(count)]
    whole = records.frame(rows)
    monkeypatch.setattr(records, "_ROWS_AT_ONCE", 2)
    assert_frame_equal(records.frame(rows), whole)
    assert list(whole["m"]) == list(range(count))


def test_a_row_and_its_values_are_the_same_but_for_what_is_missing():
    row = dict.fromkeys(records.COLUMNS) | ROW
    values = records.key(row) + records.key(row, records.ANSWER)
    assert list(values) == list(row.values())
    assert records.row(values) == {name: value for name, value in row.items() if value is not None}


# Export.


@pytest.mark.parametrize("count", [0, 2])
def test_an_export_reads_back_equal(tmp_path, count):
    rows = records.frame([ROW, ROW | {"m": 1536, "async_copy": None, "lds_bytes": None}][:count])
    path = records.export(rows, tmp_path / "new" / "rows.parquet")
    assert path == tmp_path / "new" / "rows.parquet"
    assert_frame_equal(records.read(path), rows)


def test_an_export_replaces_the_last_one_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "rows.parquet"
    records.export(records.frame([ROW]), path)
    records.export(records.frame([ROW | {"m": 1536}]), path)
    assert list(records.read(path)["m"]) == [1536]
    assert list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, sys
from moelab import records
rows = records.read(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
records.export(rows, sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_an_export_that_fails_midway_leaves_the_last_one_alone(tmp_path):
    path = records.export(records.frame([ROW]), tmp_path / "rows.parquet")
    before = path.read_bytes()
    assert len(before) > 1024
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True
    )
    assert process.returncode == 1
    assert "DiskFullError" in process.stderr and "File too large" in process.stderr
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["rows.csv", "rows", "rows.parquet.gz"])
def test_another_suffix_is_answered_with_the_right_name(tmp_path, name):
    with pytest.raises(ValueError) as error:
        records.export(records.frame([ROW]), tmp_path / name)
    assert str((tmp_path / name).with_suffix(".parquet")) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    records.frame([ROW]).drop(columns=["lds_bytes", "target"]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column target, lds_bytes: not an export of moelab"):
        records.read(tmp_path / "a.parquet")


def test_an_export_of_a_later_moelab_is_refused(tmp_path):
    path = records.export(records.frame([ROW, ROW | {"schema": 99}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"schema 99; .* upgrade moelab"):
        records.read(path)

"""A side of a comparison is read whole, or the damaged row is named and nothing is read."""

import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_regress import row, timed

from moelab import baselines, records, trade


@pytest.fixture
def store(tmp_path):
    """A store of two journals with two rows each."""
    folder = tmp_path / "rows"
    for m in (512, 2560):
        with records.Journal(folder) as journal:
            journal.append(row(m=m))
            journal.append(timed(m=m))
    return folder


@pytest.fixture
def export(tmp_path):
    return records.export(records.frame([row(), timed(), row(m=2560)]), tmp_path / "rows.parquet")


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


def journals(store):
    return sorted(store.glob("*.jsonl"))


def altered(store, **changed):
    """Change the second row of the first journal."""
    path = journals(store)[0]
    first, second = lines(path)
    path.write_bytes(first + records.encode(records.decode(second.strip()) | changed))
    return path


def refused(source):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        baselines.read(source)
    return str(error.value)


def test_a_store_and_its_export_are_the_same_rows(store, tmp_path):
    rows = baselines.read(store)
    assert len(rows) == 4
    records.export(rows, tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(baselines.read(tmp_path / "rows.parquet"), rows)


@pytest.mark.parametrize("end", ["", "\x00", "\udcff"])
def test_a_torn_line_is_named_with_its_file(store, end):
    path = journals(store)[1]
    path.write_text(path.read_text()[:-40] + end, errors="surrogateescape")
    assert refused(store) == f"{path}, line 2: not a row: the line is torn or damaged"


def test_a_line_that_was_changed_is_named_with_its_file(store):
    path = journals(store)[1]
    path.write_bytes(path.read_bytes().replace(b'"m": 2560', b'"m": 2568'))
    assert refused(store) == (
        f"{path}, line 1: not the row that was written: its checksum is another"
    )


def test_a_line_that_was_set_aside_stops_no_reading(store):
    path = journals(store)[1]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="set aside"):
        list(records.journalled(store, aside=True))
    assert len(baselines.read(store)) == 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lds_bytes": "many"}, "lds_bytes is 'many', not of type Int64"),
        ({"lds_bytes": 1.5}, "lds_bytes is '1.5', not of type Int64"),
        ({"lds_bytes": 10**30}, f"lds_bytes is '{10**30}', not of type Int64"),
        ({"lds_bytes": True}, "lds_bytes is 'True', not of type Int64"),
        ({"gather": 1}, "gather is '1', not of type boolean"),
        ({"time_us": "fast"}, "time_us is 'fast', not of type Float64"),
        ({"time_us": -3.0}, "time_us is -3.0, not a time"),
        ({"time_us": float("inf")}, "time_us is inf, not a time"),
        ({"time_us": 10**400}, "time_us is '1000"),
        ({"model": "\ud800x"}, "model is 'x', not of type string"),
        ({"kernel": 7}, "kernel is '7', not of type string"),
        ({"kernel": None}, "says no kernel"),
        ({"status": "fine"}, "status 'fine' is none of ok, out_of_lds"),
        ({"status": None}, "status '-' is none of ok"),
        ({"mode": "guessed"}, "mode 'guessed' is none of lds"),
        ({"schema": 999}, f"schema 999; this moelab reads 1 to {records.SCHEMA_VERSION}"),
        ({"schema": None}, "not a row: it has no status, or no schema's number"),
        ({"schema": "5"}, "not a row: it has no status, or no schema's number"),
        ({"samples_us": "[[1, 2], [3"}, "samples_us is damaged: [[1, 2], [3"),
        ({"samples_us": "[[1, 2], []]"}, "samples_us is damaged"),
        ({"samples_us": "[[1, 2], [0]]"}, "samples_us is damaged"),
        ({"samples_us": "[[1, NaN], [2]]"}, "samples_us is damaged"),
        ({"samples_us": "[]"}, "samples_us is damaged: []"),
        ({"samples_us": f"[[1, {10**400}], [2]]"}, "samples_us is damaged"),
        ({"samples_us": "[[1e308], [5e-324]]"}, "samples_us is damaged"),
        ({"samples_us": "[" * 100_000}, "samples_us is damaged"),
        ({"made_by": "[]"}, "made_by is damaged: []"),
    ],
)
def test_a_damaged_row_is_named_with_its_file_line_and_column(store, changed, words):
    path = altered(store, **changed)
    said = refused(store)
    assert said.startswith(f"{path}, line 2: {words}")
    assert len(said) < 500 + len(str(path))


def test_a_line_nested_without_end_is_named(store):
    path = journals(store)[1]
    path.write_text("[" * 100_000 + "]" * 100_000 + "\n")
    assert refused(store) == f"{path}, line 1: not a row: the line is torn or damaged"


@pytest.mark.parametrize("line", ["[1, 2]", "3", "null", '"row"'])
def test_a_line_that_is_json_and_no_row_is_named(store, line):
    path = journals(store)[0]
    path.write_bytes(lines(path)[0] + line.encode() + b"\n")
    assert f"{path}, line 2: not a row" in refused(store)


def test_rows_of_an_earlier_schema_are_read_as_records_reads_them(store):
    path = journals(store)[0]
    earlier = json.loads(lines(path)[0])
    del earlier["crc"]
    earlier = {name: earlier[name] for name in earlier if name != "group_m"} | {"schema": 4}
    path.write_text(json.dumps(earlier) + "\n")
    assert set(baselines.read(store)["group_m"]) == {4}


@pytest.mark.parametrize("kind", ["store", "export"])
def test_no_rows_are_an_error(tmp_path, kind):
    source = tmp_path / ("rows" if kind == "store" else "rows.parquet")
    if kind == "store":
        source.mkdir()
    else:
        records.export(records.frame([]), source)
    assert refused(source) == f"{source} is empty: no row to compare"


def test_rows_of_an_earlier_schema_among_later_ones_must_say_what_those_say(export):
    rows = pd.read_parquet(export)
    rows.loc[2, "schema"] = 4
    rows.to_parquet(export)
    # As a store of old rows and new ones exports them.
    assert len(baselines.read(export)) == 3
    rows.loc[2, "fast_accum"] = None
    rows.to_parquet(export)
    assert refused(export) == (
        f"{export}, row 3: says no fast_accum, of schema 4: rows of two schemas were mixed; "
        "compare them apart"
    )


def test_a_damaged_row_of_an_export_is_named(export):
    rows = pd.read_parquet(export)
    rows.loc[1, "status"] = "fine"
    rows.to_parquet(export)
    assert refused(export).startswith(f"{export}, row 2: status 'fine' is none of")


def test_a_flipped_bit_in_an_export_is_noticed(export):
    whole = export.read_bytes()
    unread = 0
    for at in range(40, len(whole) - 8, len(whole) // 60):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        export.write_bytes(flipped)
        try:
            rows = baselines.read(export)
        except ValueError as error:
            assert str(export) in str(error)
            unread += 1
            continue
        export.write_bytes(whole)
        pd.testing.assert_frame_equal(rows, baselines.read(export))
    assert unread > 10


@pytest.mark.parametrize("content", [b"", b"PAR1", b"kernel,lds\n", b"\x00" * 5000])
def test_what_is_no_parquet_is_an_error(tmp_path, content):
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    assert refused(path).startswith(f"{path}: not readable as Parquet: ")


def test_anybodys_parquet_is_not_rows(tmp_path):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"kernel": ["a"]}), path)
    assert refused(path) == f"{path}: not rows of moelab: no column schema or status"


# Which rows.


def test_some_rows_are_taken_by_their_values(store):
    assert set(baselines.read(f"{store}@m=512")["m"]) == {512}
    some = baselines.read(f"{store}@m=512, mode=measured")
    assert list(some["run"]) == ["first"]
    assert len(baselines.read(f"{store}@run=none,scatter=FALSE")) == 2


def test_the_rows_of_a_stage_policy_are_taken_after_their_values():
    rows = baselines.read("h200_stage_sweep@stages=most,kernel=moe_gemm_a8w4")
    whole = records.read(trade.SHIPPED)
    expected = trade.under(whole[whole["kernel"] == "moe_gemm_a8w4"], trade.MOST)
    assert rows.equals(expected)


def test_several_sources_are_read_as_one(store):
    joined = baselines.read(f"{store}@m=512 + {store}@m=2560")
    assert sorted(joined["m"]) == sorted(baselines.read(store)["m"])
    assert list(joined.index) == [0, 1, 2, 3]
    other = store.with_name("a + b")
    store.rename(other)
    assert len(baselines.read(other)) == 4


def test_of_several_sources_the_damaged_one_is_named(store, tmp_path):
    assert "nowhere: no such file" in refused(f"{store} + {tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("m=7", "no row has m '7'; there are 512, 2560"),
        ("tokens=512", "rows have no column 'tokens'"),
        ("m=512,layer", "'layer' after @ is not COLUMN=VALUE"),
        ("m=512,m=2560", "rows@m=512,m=2560: a column is named twice after @"),
        ("stages=deep", "rows@stages=deep: no stage policy 'deep'; there are most, most2"),
    ],
)
def test_values_that_no_row_has_are_told_with_those_there_are(store, wanted, words):
    assert words in refused(f"{store}@{wanted}")


def test_a_path_may_have_an_at_sign(store):
    other = store.with_name("rows@m=512")
    store.rename(other)
    assert len(baselines.read(other)) == 4
    assert len(baselines.read(f"{other}@m=2560")) == 2


def test_the_shipped_sweep_has_a_name():
    rows = baselines.read("h200_stage_sweep@m=8704")
    assert len(rows) == (records.read(trade.SHIPPED)["m"] == 8704).sum() > 0


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in a folder that has no store called as a baseline is."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_baselines_of_ones_own_lie_in_a_folder_and_go_by_name(export, elsewhere, monkeypatch):
    assert refused("main").endswith("; $MOELAB_BASELINES names a folder of more")
    monkeypatch.setenv("MOELAB_BASELINES", str(export.parent))
    assert len(baselines.read("rows")) == 3
    said = refused("main")
    assert "h200_stage_sweep" in said
    assert said.endswith(", rows")


@pytest.mark.parametrize("name", ["../rows", "sub/rows", ".rows", "rows\n"])
def test_a_name_leads_nowhere_else(export, elsewhere, monkeypatch, name):
    folder = export.parent / "kept"
    (folder / "sub").mkdir(parents=True)
    for place in (folder / "sub", folder):
        (place / "rows.parquet").write_bytes(export.read_bytes())
    (folder / ".rows.parquet").write_bytes(export.read_bytes())
    monkeypatch.setenv("MOELAB_BASELINES", str(folder))
    assert "no such file, store or baseline" in refused(name)
    assert len(baselines.read("rows")) == 3

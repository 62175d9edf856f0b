"""Rows on disk: what was asked, what the compiler answered.

Rows are journalled as they come, one append-only JSON Lines file per writer in the
store's folder; Parquet is the export. Both have checksums: what a crash tore or a disk
flipped is named and left out, and is never read as another figure. Whoever reads needs
neither torch nor triton.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import secrets
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import inert
from .disk import make_folder, replace, room_at, sync_folder

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA_VERSION = 6

# What earlier schemas did not say, for it was always so: of 1, and of 2.
_SINCE: dict[int, dict[str, Any]] = {
    2: {
        "scatter": False,
        "x_format": None,
        "y_format": "bf16",
        "scale_layout": "rows",
        "n_bf16": 0,
        "split_k": 1,
    },
    3: {"args": None, "options": None, "buffers": None},
    4: dict.fromkeys(
        (
            *("gpu", "workload", "run", "time_us", "time_low_us", "time_high_us", "tflops"),
            *("roof_tflops", "samples_us", "largest_error", "loaded_lds_bytes", "clock_mhz"),
            *("temperature_c", "made_by"),
        )
    ),
    5: {
        "fast_accum": False,
        "group_m": 4,
        "tma": False,
        "tails": 0,
        "persistent": False,
        "specialized": False,
        **dict.fromkeys(("peer", "includes", "both_layers_us", "throttled")),
    },
    6: {"side": None},
}

# Every column, in order, with its pandas type. Nullable types: a missing figure is
# missing, never zero.
COLUMNS = {
    "kernel": "string",  # by name; FILE.py:KERNEL if it is not one of ours, without a problem
    "model": "string",
    "layer": "Int64",
    "tp": "Int64",
    "m": "Int64",  # tokens before top-k
    "experts": "Int64",
    "top_k": "Int64",
    "n": "Int64",
    "k": "Int64",
    "gather": "boolean",
    "swiglu": "boolean",
    "weighted": "boolean",
    "bias": "boolean",
    "scatter": "boolean",
    "x_format": "string",  # missing where the kernel has one, or takes its first
    "y_format": "string",
    "scale_layout": "string",  # of w's mx scales
    "n_bf16": "Int64",  # columns of a bf16 weight beside w
    "fast_accum": "boolean",
    "args": "string",  # JSON, of a kernel that is not one of ours; so are its options
    "options": "string",
    "target": "string",
    "triton": "string",
    "block_m": "Int64",
    "block_n": "Int64",
    "block_k": "Int64",
    "split_k": "Int64",
    "group_m": "Int64",  # these five: how programs go about their tiles, as in `Tile`
    "tma": "boolean",
    "tails": "Int64",
    "persistent": "boolean",
    "specialized": "boolean",
    "num_warps": "Int64",
    "num_stages": "Int64",
    "async_copy": "boolean",  # missing where the target has no such switch
    "mode": "string",  # one of MODES: what was asked
    "compile_key": "string",  # equal for launches that compile to the same code
    "gpu": "string",  # name of the device; here and below missing unless mode is measured
    "workload": "string",  # routing: which experts tokens visit, and the seed
    "run": "string",  # one call's, whose rows were interleaved
    "side": "string",  # of `moelab measure --ab`: base or candidate; missing otherwise
    "peer": "string",  # whose kernel it is, if not ours: it has no tile
    "includes": "string",  # what of gather, padding and scatter a peer's time includes
    "status": "string",  # one of STATUSES
    "reason": "string",  # why the status isn't ok
    "lds_bytes": "Int64",
    "lds_limit": "Int64",  # bytes
    "tmem_columns": "Int64",
    "method": "string",  # allocation or full: how the LDS was told
    "buffers": "string",  # JSON: what takes which bytes, as `lds_map` reads it
    "registers": "Int64",  # per thread; here and below missing unless mode is full
    "scalar_registers": "Int64",  # per wave
    "spilled_registers": "Int64",  # per thread
    "scratch_bytes": "Int64",  # per thread
    "code_bytes": "Int64",
    "workgroups_per_cu": "Int64",
    "warps_per_simd": "Float64",
    "occupancy_limit": "string",  # lds, registers, warps or workgroups
    "time_us": "Float64",  # median over rounds of each round's median
    "time_low_us": "Float64",  # 95% interval of that, from the rounds' spread
    "time_high_us": "Float64",
    "both_layers_us": "Float64",  # this launch and the other layer's, one after the other
    "tflops": "Float64",  # useful FLOPs over time_us
    "roof_tflops": "Float64",  # the least of what compute and bandwidth allow, measured
    "samples_us": "string",  # JSON: a list of samples for each round
    "largest_error": "Float64",  # of y, over the largest element of the reference
    "loaded_lds_bytes": "Int64",  # as the loaded kernel reports
    "clock_mhz": "Float64",  # of the SMs, median over rounds
    "temperature_c": "Float64",  # of the device, the highest of the rounds
    "throttled": "string",  # why the clocks were held down, comma-separated; none, ""
    "made_by": "string",  # JSON: driver, PyTorch, kernel source, date
    "moelab": "string",
    "schema": "Int64",
}

MODES = {
    "lds": "the LDS, by the shortest way",
    "map": "and what takes it",
    "full": "and what the finished machine code takes",
    "measured": "and how long it takes on the GPU at hand",
}

STATUSES = {
    "ok": "fits",
    "out_of_lds": "needs more LDS / shared memory than a workgroup may use",
    "wrong_result": "its output is not the reference's; it was not timed",
    "out_of_memory": "the GPU's memory does not hold its tensors; not timed",
    "launch_error": "was told to fit, but could not be launched; `reason` has the words",
    "lds_differs": "the GPU loaded other LDS than was told, a fault of moelab's; not timed",
    "out_of_tmem": "needs more tensor memory than an SM has",
    "compile_error": "the compiler rejects it; `reason` has its words",
    "crashed": "the compiler died; `reason` has its last words",
    "timeout": "the compiler did not finish in time",
    "out_of_host_memory": "the compiler needs more of this machine's memory than it was given",
    "unavailable": "a peer that can't run here; `reason` says what it lacks",
}

# Worth asking again: these say nothing of the configuration.
UNANSWERED = ("crashed", "timeout", "out_of_host_memory")

# What tells two rows apart: everything that was asked.
KEY = tuple(itertools.takewhile(lambda name: name != "status", COLUMNS))

# What was answered.
ANSWER = tuple(COLUMNS)[len(KEY) :]


def key(row: Mapping[str, Any], of: Iterable[str] = KEY) -> tuple[Any, ...]:
    """Tell a row from every other, or by some columns from some others."""
    return tuple(map(row.get, of))


def row(values: Iterable[Any]) -> dict[str, Any]:
    """Make a row of its values, in the order of `COLUMNS`; None is left out, as missing is."""
    named = zip(COLUMNS, values, strict=True)
    return {name: value for name, value in named if value is not None}


# What a file of rows may be, whoever wrote it. The longest shipped row is a line of
# 3.4 KiB; 1000 rounds of 100 samples would be 0.8 MiB.
MOST_LINE_BYTES = 4 << 20
MOST_FILE_BYTES = 256 << 20
MOST_ROWS = 1 << 20
MOST_DECODED_BYTES = 1 << 30

# No launch is over in less than a nanosecond, or takes eleven days.
_SHORTEST_US, _LONGEST_US = 1e-3, 1e12

_PYTHON: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "Int64": int,
    "boolean": bool,
    "Float64": (int, float),
}

# Half of a surrogate pair: JSON can spell it, and it is no text.
_HALF = re.compile("[\ud800-\udfff]")


class UnreadableError(ValueError):
    """A file that is no file of rows, or more than is read; the message says what would be."""


def require_readable(path: Path) -> Path:
    """Refuse a file that is too large to be read whole.

    Raises:
        UnreadableError: it has more than `MOST_FILE_BYTES`.
        OSError: there is none.
    """
    if (size := path.stat().st_size) > MOST_FILE_BYTES:
        raise UnreadableError(
            f"{path} has {size:,} bytes; files of up to {MOST_FILE_BYTES:,} are read: export "
            "fewer rows to one"
        )
    return path


def fault(row: Mapping[str, Any]) -> str:
    """Say what a row says that no row says: values of other types, JSON that is none.

    Returns:
        the first of it in words, ``""`` where there is nothing.
    """
    for name, kind in COLUMNS.items():
        value = row.get(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if not _is_of(kind, value):
            return f"{name} is {inert.line(value)!r}, not of type {kind}"
    for name, whole in (("samples_us", _are_samples), ("made_by", _is_object)):
        if (value := row.get(name)) is not None and not whole(value):
            return f"{name} is damaged: {inert.line(value[:60])}"
    return ""


def _is_of(kind: str, value: Any) -> bool:
    """Say whether a column can hold a value."""
    if isinstance(value, str):
        return kind == "string" and not _HALF.search(value)
    # To Python True is a number.
    if not isinstance(value, _PYTHON[kind]) or (kind != "boolean" and isinstance(value, bool)):
        return False
    return not isinstance(value, int) or abs(value) < 2**63


def is_time(us: Any) -> bool:
    """Say whether a launch can take so many microseconds."""
    return type(us) in (int, float) and _SHORTEST_US <= us <= _LONGEST_US


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _are_samples(text: str) -> bool:
    """Say whether a text is rounds of times."""
    rounds = _parsed(text)
    return (
        isinstance(rounds, list)
        and bool(rounds)
        and all(isinstance(of, list) and of for of in rounds)
        and all(is_time(us) for of in rounds for us in of)
    )


def _is_object(text: str) -> bool:
    return isinstance(_parsed(text), dict)


# From this schema on a line without a checksum is a damaged one.
_CHECKED_SINCE = 6

_CHECKED = re.compile(rb'(.*), "crc": "([0-9a-f]{8})"\}', re.DOTALL)


class Journal:
    """Appends rows to a file of its own in a store.

    A row is acknowledged when `append` returns: it is then on the disk, not only on its way
    there, and survives a power cut. That takes 0.2 ms (benchmarks/journal.py, a virtual
    machine's ext4), of which a compile takes hundreds.
    """

    def __init__(self, store: Path):
        """Open a new file in ``store``, which is made if missing.

        Raises:
            DiskFullError: there is no room for the folder.
            OSError: it can't be made or written to.
        """
        make_folder(store)
        if not os.access(store, os.W_OK | os.X_OK):
            raise PermissionError(f"{store}: rows can't be written there; choose another store")
        # Readers let the last row of a key win, by name. Past the last name there is, as a
        # clock may have been set back since.
        taken = (re.match(r"rows-(\d+)-", path.name) for path in store.glob("rows-*.jsonl"))
        number = max([time.time_ns(), *(int(of[1]) + 1 for of in taken if of)])
        self.path = store / f"rows-{number}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._file: int | None = None
        self._bytes = 0

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows, all or none, and wait until the disk has them.

        Raises:
            DiskFullError: there is no room.
            OSError: they can't be written.
        """
        if not rows:
            return
        lines = b"".join(map(encode, rows))
        with room_at(self.path):
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                sync_folder(self.path.parent)
            try:
                left = memoryview(lines)
                while left:
                    left = left[os.write(self._file, left) :]
                os.fdatasync(self._file)
            except OSError:
                # Nobody was told that these are kept.
                os.ftruncate(self._file, self._bytes)
                raise
        self._bytes += len(lines)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)


def encode(row: Mapping[str, Any]) -> bytes:
    r"""Write a row as a line of a journal: JSON, of which the last field is a checksum.

    >>> encode({"kernel": "moe_gemm_a8w8"})
    b'{"kernel": "moe_gemm_a8w8", "crc": "abf2cca4"}\n'
    """
    # All but the closing brace: what a reader finds before the checksum.
    said = json.dumps(_plain(row))[:-1].encode()
    return said + b', "crc": "%08x"}\n' % zlib.crc32(said)


def decode(line: bytes) -> dict[str, Any]:
    """Read a line of a journal, of this schema or an earlier one.

    Raises:
        ValueError: it is no row, or not the row that was written; the message says which.
    """
    checked = _CHECKED.fullmatch(line)
    if checked and zlib.crc32(checked[1]) != int(checked[2], 16):
        raise ValueError("not the row that was written: its checksum is another")
    try:
        row = json.loads(checked[1] + b"}" if checked else line)
    except (ValueError, RecursionError):
        raise ValueError("not a row: the line is torn or damaged") from None
    if not isinstance(row, dict) or "status" not in row or type(row.get("schema")) is not int:
        raise ValueError("not a row: it has no status, or no schema's number")
    if not checked and row["schema"] >= _CHECKED_SINCE:
        raise ValueError("not the row that was written: its checksum is missing")
    return row


def check_answer(answer: Any) -> None:
    """Refuse what another machine gave for an answer, a row's second half, and is none.

    Raises:
        ValueError: a column that no answer has, or a value that the column can't have.
    """
    check_row(answer)
    if key := next((name for name in KEY if name in answer), None):
        raise ValueError(f"no answer has a column {key!r}")


def check_row(row: Any) -> None:
    """Refuse what another machine gave for a row, or a part of one, and is none.

    Raises:
        ValueError: a column that no row has, a value that the column can't have, or too many.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected columns and values, not {type(row).__name__}")
    if row.get("status") not in STATUSES or row.get("schema") != SCHEMA_VERSION:
        raise ValueError(
            f"status {inert.line(row.get('status'))!r} of schema {inert.line(row.get('schema'))}; "
            f"expected schema {SCHEMA_VERSION} and one of {', '.join(STATUSES)}"
        )
    if unknown := [name for name in row if name not in COLUMNS]:
        raise ValueError(f"no row has a column {inert.line(unknown[0])!r}")
    if words := fault(row):
        raise ValueError(words)
    if (size := len(encode(row))) > MOST_LINE_BYTES:
        raise ValueError(f"a row of {size:,} bytes; they have up to {MOST_LINE_BYTES:,}")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Write NaN as null, which is what JSON has."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in row.items()
    }


@dataclass(frozen=True)
class Line:
    """A line of a journal.

    Args:
        number: in its file, from 1.
        row: None where the line is damaged.
        damage: what is wrong with it.
    """

    path: Path
    number: int
    text: bytes
    row: dict[str, Any] | None = None
    damage: str = ""


def lines(store: Path) -> Iterator[Line]:
    """Read every line of a store's journals, but for the damaged ones that were set aside."""
    for path in sorted(store.glob("*.jsonl")):
        known = _beside(path)
        aside = set(_texts(known)) if known.exists() else set()
        for number, text in enumerate(_texts(path), start=1):
            try:
                yield Line(path, number, text, decode(text))
            except ValueError as error:
                if text not in aside:
                    yield Line(path, number, text, damage=str(error))


def _texts(path: Path) -> Iterator[bytes]:
    """Read a file line by line; of one that is too long for a row its first 64 bytes."""
    # A file's lines end with a line feed alone: to `splitlines` a flipped bit may end one.
    with path.open("rb") as file:
        while text := file.readline(MOST_LINE_BYTES):
            rest = text
            while len(rest) == MOST_LINE_BYTES and not rest.endswith(b"\n"):
                text, rest = text[:64], file.readline(MOST_LINE_BYTES)
            yield text.removesuffix(b"\n")


def _beside(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.damaged")


def _set_aside(line: Line) -> bool:
    """Copy a damaged line to a file beside its journal, where that can be written."""
    try:
        with _beside(line.path).open("ab") as file:
            file.write(line.text + b"\n")
    except OSError:
        return False
    return True


def journalled(store: Path, *, aside: bool = False) -> Iterator[dict[str, Any]]:
    """Read every row of a store; warn of a line that is damaged and go on.

    Args:
        aside: copy a damaged line to a file beside its journal; from then on readers pass over
            it in silence. The journal stays as it is, for only its own writer may touch it: a
            line that looks torn while it is being written is a row again when it is whole.
    Raises:
        ValueError: a row was written by a later moelab.
    """
    for line in lines(store):
        if line.row is None:
            done = "left out"
            if aside and _set_aside(line):
                done = f"set aside in {_beside(line.path).name}"
            where = inert.line(f"{line.path}:{line.number}", inert.LONG)
            warnings.warn(f"{where} is {line.damage}; {done}", stacklevel=2)
            continue
        schema = line.row["schema"]
        if schema > SCHEMA_VERSION:
            raise ValueError(
                f"{line.path}:{line.number} has schema {schema}; this moelab reads up to "
                f"{SCHEMA_VERSION}: upgrade moelab, or choose another store"
            )
        if wrong := fault(line.row):
            where = inert.line(f"{line.path}:{line.number}", inert.LONG)
            warnings.warn(f"{where} is no row: {wrong}; left out", stacklevel=2)
            continue
        yield _since(schema) | line.row


def _since(schema: int) -> dict[str, Any]:
    """Give what a row of an earlier schema does not say."""
    return {
        name: value
        for later, values in _SINCE.items()
        if schema < later
        for name, value in values.items()
    }


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Make rows a frame with every column of `COLUMNS`, in order and typed."""
    return of_values(key(row, COLUMNS) for row in rows)


# As columns these take 60 MB, as Python's values on the way there several times that.
_ROWS_AT_ONCE = 100_000


def of_values(rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Make a frame as `frame` does, of rows' values in the order of `COLUMNS`."""
    import pandas as pd

    rows = iter(rows)
    parts: list[pd.DataFrame] = []
    while not parts or len(parts[-1]) == _ROWS_AT_ONCE:
        some = list(itertools.islice(rows, _ROWS_AT_ONCE))
        parts.append(pd.DataFrame(some, columns=list(COLUMNS)).astype(COLUMNS))
    return pd.concat(parts, ignore_index=True)


def read(path: Path | str) -> pd.DataFrame:
    """Read rows back: a store's folder or a Parquet file.

    Of rows with the same key the last stays.

    Raises:
        FileNotFoundError: there is nothing at ``path``; the message says what would be.
        UnreadableError: an export is damaged, lacks columns, or has values that no row has.
        ValueError: a later moelab wrote the rows.
    """
    path = Path(path)
    if path.suffix == ".parquet" and path.is_file():
        stored_rows = stored(path)
        for number, row in enumerate(rows_of(stored_rows), start=1):
            if wrong := fault(row):
                raise UnreadableError(f"{path}, row {number}: {wrong}")
        table = stored_rows.to_pandas()
        if "schema" in table and len(table):
            unsaid = _since(table["schema"].max())
            table = table.assign(**{n: v for n, v in unsaid.items() if n not in table})
        if missing := [name for name in COLUMNS if name not in table]:
            raise UnreadableError(
                f"{path} has no column {', '.join(missing)}: not an export of moelab"
            )
        if len(table) and table["schema"].max() > SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema {table['schema'].max()}; this moelab reads up to "
                f"{SCHEMA_VERSION}: upgrade moelab"
            )
        return table[list(COLUMNS)].astype(COLUMNS)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no rows there; give a store's folder or a .parquet export"
        )
    return frame({key(row): row for row in journalled(path)}.values())


def stored(path: Path) -> pa.Table:
    """Read an export as it lies there, held against its checksums.

    Raises:
        UnreadableError: it is damaged, no Parquet, or larger than rows are; what it claims is
            looked at before it is read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    written = require_readable(path).read_bytes()
    # Whoever else writes Parquet seals nothing, as earlier moelabs did.
    if _SEAL in written and _sealed(written) != written:
        raise UnreadableError(f"{path}: not the file that was written: its checksum is another")
    try:
        file = pq.ParquetFile(pa.BufferReader(written), page_checksum_verification=True)
        return pa.Table.from_batches(_batches(path, file), file.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UnreadableError(f"{path}: not readable as Parquet: {reason}") from None


def _batches(path: Path, file: Any) -> Iterator[Any]:
    """Read a Parquet file piece by piece, as far as it has a place among files of rows.

    A file of a kilobyte can hold one text a billion times.
    """
    of = file.metadata
    claimed = sum(of.row_group(at).total_byte_size for at in range(of.num_row_groups))
    if of.num_rows > MOST_ROWS or claimed > MOST_DECODED_BYTES:
        raise UnreadableError(
            f"{path} claims {of.num_rows:,} rows in {claimed:,} bytes; up to {MOST_ROWS:,} rows "
            f"in {MOST_DECODED_BYTES:,} bytes are read: export fewer rows to one file"
        )
    taken = 0
    for batch in file.iter_batches(batch_size=256):
        taken += batch.get_total_buffer_size()
        if taken > MOST_DECODED_BYTES:
            raise UnreadableError(
                f"{path} has more than the {MOST_DECODED_BYTES:,} bytes that are read: export "
                "fewer rows to one file"
            )
        yield batch


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Give the rows of an export, not all of them at once."""
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


# A note in an export's footer: its name, then the checksum of the whole file.
_SEAL = b"moelab.crc"
_UNSEALED = b"00000000"


def _sealed(written: bytes) -> bytes:
    """Write the checksum of a Parquet file into it, counted where the note is still zeros.

    The checksums of pages leave out their headers: of 12,000 flipped bits in an export one
    gave another figure.
    """
    # Two bytes of Thrift between name and value; a row may have the name as text, before it.
    start = written.rfind(_SEAL) + len(_SEAL) + 2
    end = start + len(_UNSEALED)
    checksum = zlib.crc32(written[:start] + _UNSEALED + written[end:])
    return written[:start] + b"%08x" % checksum + written[end:]


def export(rows: pd.DataFrame, path: Path | str) -> Path:
    """Write rows as Parquet, whole or not at all.

    Args:
        path: ends in ``.parquet``; an existing file is replaced.
    Raises:
        DiskFullError: there is no room; what was there before stays.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: the export is Parquet; name it {path.with_suffix('.parquet')}")
    table = pa.Table.from_pandas(rows, preserve_index=False)
    parquet = io.BytesIO()
    with pq.ParquetWriter(parquet, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_SEAL: _UNSEALED})
    make_folder(path.parent)
    replace(path, _sealed(parquet.getvalue()))
    return path

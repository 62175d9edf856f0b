"""Rows on disk: what was asked, what the compiler answered.

Rows are journalled as they come, one append-only JSON Lines file per writer in the
store's folder; Parquet is the export. Whoever reads needs neither torch nor triton.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

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
    "unavailable": "a peer that can't run here; `reason` says what it lacks",
}

# Worth asking again: these say nothing of the configuration.
UNANSWERED = ("crashed", "timeout")

# What tells two rows apart: everything that was asked.
KEY = tuple(itertools.takewhile(lambda name: name != "status", COLUMNS))


def key(row: Mapping[str, Any], of: Iterable[str] = KEY) -> tuple[Any, ...]:
    """Tell a row from every other, or by some columns from some others."""
    return tuple(row.get(name) for name in of)


class Journal:
    """Appends rows to a file of its own in a store.

    Each row is one ``write`` in append mode, so a killed writer tears at most its
    last line.
    """

    def __init__(self, store: Path):
        """Open a new file in ``store``, which is made if missing.

        Raises:
            OSError: the folder can't be made or written to.
        """
        store.mkdir(parents=True, exist_ok=True)
        # Names in order of time: readers let the last row of a key win.
        name = f"rows-{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self.path = store / name
        self._file: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row.

        Raises:
            OSError: it can't be written whole.
        """
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        line = (json.dumps(_plain(row)) + "\n").encode()
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.path}: a row was written in part; is the disk full?")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Write NaN as null, which is what JSON has."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in row.items()
    }


def journalled(store: Path) -> Iterator[dict[str, Any]]:
    """Read every row of a store; warn of a line that can't be read and go on.

    Raises:
        ValueError: a row was written by a later moelab.
    """
    for path in sorted(store.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                row = json.loads(line)
                schema, _ = row["schema"], row["status"]
            except (ValueError, TypeError, KeyError):
                warnings.warn(f"{path}:{number} is not a row; left out", stacklevel=2)
                continue
            if schema > SCHEMA_VERSION:
                raise ValueError(
                    f"{path}:{number} has schema {schema}; this moelab reads up to "
                    f"{SCHEMA_VERSION}: upgrade moelab, or choose another store"
                )
            yield _since(schema) | row


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
    import pandas as pd

    table = pd.DataFrame(list(rows), columns=list(COLUMNS))
    return table.astype(COLUMNS)


def read(path: Path | str) -> pd.DataFrame:
    """Read rows back: a store's folder or a Parquet file.

    Of rows with the same key the last stays.

    Raises:
        FileNotFoundError: there is nothing at ``path``; the message says what would be.
        ValueError: columns are missing, or a later moelab wrote the rows.
    """
    import pandas as pd

    path = Path(path)
    if path.suffix == ".parquet" and path.is_file():
        table = pd.read_parquet(path)
        if "schema" in table and len(table):
            unsaid = _since(table["schema"].max())
            table = table.assign(**{n: v for n, v in unsaid.items() if n not in table})
        if missing := [name for name in COLUMNS if name not in table]:
            raise ValueError(f"{path} has no column {', '.join(missing)}: not an export of moelab")
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


def export(rows: pd.DataFrame, path: Path | str) -> Path:
    """Write rows as Parquet, whole or not at all.

    Args:
        path: ends in ``.parquet``; an existing file is replaced.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: the export is Parquet; name it {path.with_suffix('.parquet')}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(
        pa.Table.from_pandas(rows, preserve_index=False), partial, write_page_checksum=True
    )
    partial.replace(path)
    return path

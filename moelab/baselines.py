"""One side of a comparison: rows from a store, an export or a baseline's name, every row checked.

A damaged row stops the reading: a verdict on what is left would be one on something else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import inert, records
from .specs import Problem, Tile

if TYPE_CHECKING:
    import pandas as pd

_SHIPPED = Path(__file__).parent / "data"

# What every row of ours says: the fields that are never None.
_SAID = tuple(item.name for item in (*fields(Problem), *fields(Tile)) if item.default is not None)


def read(source: str | Path) -> pd.DataFrame:
    """Read one side of a comparison, every row checked.

    Args:
        source: a store's folder, a .parquet export, or the name of a baseline: a .parquet in the
            folder ``$MOELAB_BASELINES``, or one that is shipped, such as ``h200_stage_sweep``.
            ``SOURCE@COLUMN=VALUE,...`` keeps the rows that have these values, as
            ``rows.parquet@num_stages=1`` or ``rows@run=20261123T172410-cf936c``;
            ``@stages=POLICY`` those of a stage policy of `trade.under`, as ``@stages=most``.
            Several sources are joined by ``" + "``.
    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: a row is damaged, of a later schema, or of an earlier one among later ones
            without what those say; or there is none. The message names file and row.
    """
    sources = str(source).split(" + ")
    if len(sources) == 1 or Path(source).exists():
        return _read(str(source))
    import pandas as pd

    return pd.concat([_read(each.strip()) for each in sources], ignore_index=True)


def _read(source: str) -> pd.DataFrame:
    name, wanted = _parted(source)
    path = _located(name)
    for where, row in _rows_at(path):
        _check(where, row)
    rows = _frame(path)
    if rows.empty:
        raise ValueError(f"{path} is empty: no row to compare")
    policy = wanted.pop("stages", None)
    for column, value in wanted.items():
        if column not in rows:
            raise ValueError(f"{source}: rows have no column {column!r}; see moelab.records")
        spelled = rows[column].astype("string").fillna("none").str.casefold()
        kept = rows[spelled == value.casefold()]
        if kept.empty:
            there = listed(map(inert.line, set(spelled)), 8)
            raise ValueError(f"{source}: no row has {column} {value!r}; there are {there}")
        rows = kept
    return rows if policy is None else _under(source, rows, policy)


def _under(source: str, rows: pd.DataFrame, policy: str) -> pd.DataFrame:
    from . import trade

    try:
        kept = trade.under(rows, policy)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if kept.empty:
        raise ValueError(f"{source}: no row has the stages of {policy!r}")
    return kept


def _frame(path: Path) -> pd.DataFrame:
    """Read rows that were checked; what damage there is left lies in an export's schema."""
    try:
        return records.read(path)
    except (ValueError, LookupError, TypeError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: not readable as rows: {inert.line(error)}") from None


def _parted(source: str) -> tuple[str, dict[str, str]]:
    """Part a source from what its rows are to have."""
    name, at, rest = source.rpartition("@")
    if not at or Path(source).exists() or "=" not in rest:
        return source, {}
    pairs = [each.partition("=") for each in rest.split(",")]
    if wrong := [column for column, equals, _ in pairs if not equals or not column]:
        raise ValueError(f"{source}: {wrong[0]!r} after @ is not COLUMN=VALUE")
    wanted = {column.strip(): value.strip() for column, _, value in pairs}
    if len(wanted) < len(pairs):
        raise ValueError(f"{source}: a column is named twice after @; rows have one value of each")
    return name, wanted


def _located(name: str) -> Path:
    """Find a path, or a baseline by name."""
    path = Path(name)
    if path.exists():
        return path
    own = os.environ.get("MOELAB_BASELINES")
    folders = [*([Path(own)] if own else []), _SHIPPED]
    for folder in folders:
        if inert.is_file_name(name) and (kept := folder / f"{name}.parquet").is_file():
            return kept
    named = ", ".join(
        sorted({kept.stem for folder in folders for kept in folder.glob("*.parquet")})
    )
    raise FileNotFoundError(
        f"{name}: no such file, store or baseline; give a store's folder, a .parquet export, or "
        f"one of {named}" + ("" if own else "; $MOELAB_BASELINES names a folder of more")
    )


def _rows_at(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give every row of a store or an export as it lies there, and where."""
    if path.is_dir():
        for line in records.lines(path):
            where = f"{line.path}, line {line.number}"
            if line.row is None:
                raise ValueError(f"{where}: {line.damage}")
            yield where, line.row
        return
    table = records.stored(path)
    if "schema" not in table.column_names or "status" not in table.column_names:
        raise ValueError(f"{path}: not rows of moelab: no column schema or status")
    for number, row in enumerate(records.rows_of(table), start=1):
        yield f"{path}, row {number}", row


def _check(where: str, row: dict[str, Any]) -> None:
    """Refuse a row that doesn't say what a row says.

    Raises:
        ValueError: naming where it is, the column and its value.
    """
    schema = row.get("schema")
    if type(schema) is not int or not 1 <= schema <= records.SCHEMA_VERSION:
        raise ValueError(
            f"{where}: schema {inert.line(schema)}; this moelab reads 1 to {records.SCHEMA_VERSION}"
        )
    if fault := records.fault(row):
        raise ValueError(f"{where}: {fault}")
    for name, known in (("status", records.STATUSES), ("mode", records.MODES)):
        if row.get(name) not in known:
            raise ValueError(
                f"{where}: {name} {inert.line(row.get(name))!r} is none of {', '.join(known)}"
            )
    for name in ("kernel", "target"):
        if row.get(name) is None:
            raise ValueError(f"{where}: says no {name}")
    # A column that is there for the rows of a later schema alone.
    if row.get("model") is not None and row.get("peer") is None:
        for name in _SAID:
            if name in row and row[name] is None:
                raise ValueError(
                    f"{where}: says no {name}, of schema {schema}: rows of two schemas were mixed; "
                    "compare them apart"
                )
    time = row.get("time_us")
    if time is not None and not records.is_time(time):
        raise ValueError(f"{where}: time_us is {inert.line(time)}, not a time")


def listed(values: Iterable[str], most: int = 5) -> str:
    """Write values in one line, the shortest first, and count those beyond the first ones."""
    ordered = sorted(values, key=lambda text: (len(text), text))
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "none") + more

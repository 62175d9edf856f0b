"""One side of a comparison: rows from a store, an export or a baseline's name, every row checked.

A damaged row stops the reading: a verdict on what is left would be one on something else.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import inert, records
from .specs import Problem, Tile

if TYPE_CHECKING:
    import pandas as pd

_SHIPPED = Path(__file__).parent / "data"

# Half of a surrogate pair: JSON can spell it, and it is no text.
_HALF = re.compile("[\ud800-\udfff]")

_PYTHON: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "Int64": int,
    "boolean": bool,
    "Float64": (int, float),
}


# No launch is over in less than a nanosecond, or takes eleven days.
_SHORTEST_US, _LONGEST_US = 1e-3, 1e12

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
    for number, row in enumerate(table.to_pylist(), start=1):
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
    for name, kind in records.COLUMNS.items():
        value = row.get(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if not _is_of(kind, value):
            raise ValueError(f"{where}: {name} is {inert.line(value)!r}, not of type {kind}")
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
    if time is not None and not _is_time(time):
        raise ValueError(f"{where}: time_us is {inert.line(time)}, not a time")
    for name, whole in (("samples_us", _are_samples), ("made_by", _is_made_by)):
        if (value := row.get(name)) is not None and not whole(value):
            raise ValueError(f"{where}: {name} is damaged: {inert.line(value[:60])}")


def _is_of(kind: str, value: Any) -> bool:
    """Say whether a column can hold a value."""
    if isinstance(value, str):
        return kind == "string" and not _HALF.search(value)
    # To Python True is a number.
    if not isinstance(value, _PYTHON[kind]) or (kind != "boolean" and isinstance(value, bool)):
        return False
    return not isinstance(value, int) or abs(value) < 2**63


def _is_time(us: Any) -> bool:
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
        and all(_is_time(us) for of in rounds for us in of)
    )


def _is_made_by(text: str) -> bool:
    return isinstance(_parsed(text), dict)


def listed(values: Iterable[str], most: int = 5) -> str:
    """Write values in one line, the shortest first, and count those beyond the first ones."""
    ordered = sorted(values, key=lambda text: (len(text), text))
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "none") + more

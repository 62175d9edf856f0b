"""Where the LDS goes: every byte of a kernel's total, accounted for.

The compiler lays buffers that never live at the same time over each other. A map is
right where it explains the total to the last byte: `explained` holds it to that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from . import inert, records, tables
from .specs import Buffer, LdsMap, Question

if TYPE_CHECKING:
    import pandas as pd

# The widest alignment that Triton asks of a buffer: NVIDIA's matrix units read tiles whose
# rows are swizzled over 1,024 bytes (PTX ISA, wgmma and tcgen05 matrix descriptors).
_WIDEST_ALIGNMENT = 1024


class UnexplainedError(ValueError):
    """The buffers don't account for the LDS; the message says where."""


@dataclass(frozen=True)
class Region:
    """Bytes with the same owners throughout.

    Args:
        owners: the buffers that they belong to, one after another in time; none in a gap.
        why: how several may own them, or why none does; empty for a single owner.
    """

    offset: int
    size_bytes: int
    owners: tuple[Buffer, ...]
    why: str


def explained(buffers: Sequence[Buffer], lds_bytes: int) -> tuple[Region, ...]:
    """Account for every byte of the LDS.

    Returns:
        all regions from 0 to ``lds_bytes``, by offset.
    Raises:
        UnexplainedError: bytes that no buffer owns and no alignment explains, two buffers
            in the same bytes at the same time, or an end that is not ``lds_bytes``.
    """
    end = max((buffer.end for buffer in buffers), default=0)
    if end != lds_bytes:
        raise UnexplainedError(f"the buffers end at {end:,}, the LDS at {lds_bytes:,} bytes")
    cuts = sorted({0, *(cut for buffer in buffers for cut in (buffer.offset, buffer.end))})
    regions = []
    for start, stop in pairwise(cuts):
        owners = tuple(
            sorted(
                (b for b in buffers if b.offset <= start and stop <= b.end),
                key=lambda buffer: buffer.first,
            )
        )
        for before, after in pairwise(owners):
            if after.first < before.last:
                raise UnexplainedError(
                    f"{before.name} (operations {before.first} to {before.last}) and "
                    f"{after.name} ({after.first} to {after.last}) both live in bytes "
                    f"{start:,} to {stop:,}"
                )
        regions.append(Region(start, stop - start, owners, _why(start, stop, owners)))
    return tuple(regions)


def _why(start: int, stop: int, owners: Sequence[Buffer]) -> str:
    if len(owners) == 1:
        return ""
    if owners:
        lives = ", ".join(f"{owner.name} until {owner.last}" for owner in owners[:-1])
        return f"one after another: {lives}, {owners[-1].name} from {owners[-1].first}"
    # The largest power of two that the next buffer's offset is a multiple of.
    if stop - start < min(stop & -stop, _WIDEST_ALIGNMENT):
        return "free: what follows is aligned"
    raise UnexplainedError(f"no buffer owns bytes {start:,} to {stop:,}")


def table(buffers: Sequence[Buffer]) -> pd.DataFrame:
    """List the buffers for people, in program order."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "buffer": buffer.name,
                "operation": buffer.operation,
                "line": buffer.line,
                "shape": "x".join(map(str, buffer.shape)),
                "dtype": buffer.dtype,
                "copies": buffer.copies,
                "padding (bytes)": buffer.padding_bytes,
                "size (bytes)": buffer.size_bytes,
                "offset (bytes)": buffer.offset,
                "first": buffer.first,
                "last": buffer.last,
            }
            for buffer in buffers
        ],
    )


def sentence(
    buffers: Sequence[Buffer],
    lds_bytes: int,
    lds_limit: int,
    num_stages: int,
    without_async: Sequence[Buffer] | None = None,
) -> str:
    """Say what takes most of the LDS where it is fullest.

    Args:
        without_async: the same launch's buffers with async copy off, where it is on.
    """
    if not buffers:
        return "No LDS: no buffer is kept there."
    # The LDS ends with a buffer; what lives while it does is what didn't fit below.
    highest = max(buffers, key=lambda buffer: (buffer.end, buffer.size_bytes))
    together = [b for b in buffers if b.first < highest.last and highest.first < b.last]
    most = max(together, key=lambda buffer: buffer.size_bytes)
    said = f"{most.name} takes {most.size_bytes:,} of {lds_bytes:,} bytes"
    said += f": {_parts(most, buffers, num_stages)}"
    if without_async is not None:
        said += f"; {_added(most, without_async)}"
    over = lds_bytes - lds_limit
    if over > 0:
        said += f"; the whole is {over:,} more than the limit of {lds_limit:,}"
    return said + "."


def _parts(most: Buffer, buffers: Sequence[Buffer], num_stages: int) -> str:
    """Say what a buffer is made of."""
    if most.operation != "local_alloc":
        kept = max((b.end for b in buffers if b.operation == "local_alloc"), default=0)
        more = f", where what outlives an operation ends at {kept:,}" if kept < most.end else ""
        return f"scratch of one operation{more}"
    # Padding runs through all copies: it need not divide by them.
    each = f"{most.size_bytes // most.copies:,}"
    if most.size_bytes % most.copies:
        each = f"about {each}"
    if most.copies == num_stages > 1:
        return f"{most.copies} stages of {each}"
    copies = "1 copy" if most.copies == 1 else f"{most.copies} copies"
    return f"{copies} of {each} at num_stages = {num_stages}"


def _added(most: Buffer, without: Sequence[Buffer]) -> str:
    """Say what async copy changed of a buffer."""
    same = [b for b in without if (b.name, b.line, b.shape) == (most.name, most.line, most.shape)]
    if not same:
        return "without async copy there is no such buffer"
    copies = most.copies - same[0].copies
    if copies > 0:
        return f"async copy added {'one' if copies == 1 else copies} of them"
    added = most.size_bytes - same[0].size_bytes
    if added:
        return f"async copy changed it by {added:+,} bytes"
    return "async copy added none of it"


@dataclass(frozen=True)
class Told:
    """A row's map, in words.

    Args:
        title: what was asked.
    """

    title: str
    sentence: str
    map: LdsMap
    lds_bytes: int
    lds_limit: int

    @property
    def markdown(self) -> str:
        """Title and sentence, of whatever kernel."""
        return f"**{inert.markdown(self.title)}**: {inert.markdown(self.sentence, inert.LONG)}"


def tell(rows: pd.DataFrame, others: pd.DataFrame | None = None) -> list[Told]:
    """Put the maps that rows have into words, each compile's once.

    What has async copy on is set against the same with it off, where the rows have that.

    Args:
        others: rows that are not told of, but set against.
    Returns:
        one or more; one that says so where no row has a map.
    """
    import pandas as pd

    asked = [name for name in records.KEY if name not in ("async_copy", "compile_key", "mode")]
    without = pd.concat([rows, others]) if others is not None else rows
    without = without[without["async_copy"].eq(False) & without["buffers"].notna()]
    twins = {records.key(row, asked): row["buffers"] for row in without.to_dict("records")}
    rows = tables.labelled(rows[rows["buffers"].notna() & rows["lds_bytes"].notna()])
    told = {}
    for row in rows.to_dict("records"):
        here = from_json(row["buffers"])
        twin = twins.get(records.key(row, asked)) if row["async_copy"] is True else None
        said = here.missing or sentence(
            here.buffers,
            row["lds_bytes"],
            row["lds_limit"],
            row["num_stages"],
            from_json(twin).buffers if twin else None,
        )
        told[row["compile_key"]] = Told(_title(row), said, here, row["lds_bytes"], row["lds_limit"])
    unknown = Told("no configuration", "No map is known.", LdsMap(missing="no map is known"), 0, 0)
    return list(told.values()) or [unknown]


def largest(questions: Sequence[Question], rows: pd.DataFrame) -> list[Question]:
    """Pick the question that needs the most LDS, after the same with async copy off if asked.

    Args:
        rows: their answers, in their order.
    """
    import numpy as np

    needs = rows["lds_bytes"].to_numpy(dtype=float, na_value=np.nan)
    if np.isnan(needs).all():
        return []
    most = questions[int(np.nanargmax(needs))]
    twin = replace(most, async_copy=False)
    return [twin, most] if most.async_copy is not False and twin in questions else [most]


def _title(row: dict[str, Any]) -> str:
    """Name a row's configuration."""
    switch = row[tables.ASYNC_COPY]
    own = isinstance(row["tile"], str)
    args = {} if own else json.loads(row["args"])
    parts = [
        f"{row['kernel']} {row['tile']}" if own else row["kernel"],
        *(f"{name} {value}" for name, value in args.items() if isinstance(value, (int, float))),
        f"{row['num_warps']} warps",
        f"{row['num_stages']} stage{'s' if row['num_stages'] > 1 else ''}",
        row["target"],
        *([] if switch == "no switch" else [f"async copy {switch}"]),
        f"Triton {row['triton']}",
    ]
    return ", ".join(map(inert.line, parts))


def to_json(of: LdsMap) -> str:
    """Write a map on one short line."""
    fields = {
        "positions": of.positions,
        "missing": of.missing,
        "buffers": [astuple(buffer) for buffer in of.buffers],
    }
    return json.dumps(fields, separators=(",", ":"))


def from_json(text: str) -> LdsMap:
    """Read what `to_json` wrote; what else a row may have is a map that is missing."""
    try:
        fields = json.loads(text)
        missing = fields["missing"] and inert.line(fields["missing"])
        buffers = tuple(_buffer(*of) for of in fields["buffers"])
        return LdsMap(buffers, int(fields["positions"]), missing)
    except (ValueError, TypeError, LookupError, RecursionError):
        return LdsMap(missing="what the row says of its buffers is damaged")


def _buffer(
    name: str, operation: str, line: str, shape: list[int], dtype: str, copies: int, *others: int
) -> Buffer:
    """Make a buffer of what a row says, which somebody else may have written."""
    sizes = (*shape, *others)
    if any(type(of) is not int or of < 0 for of in sizes) or type(copies) is not int or copies < 1:
        raise ValueError
    name, operation, line, dtype = (
        inert.line(of) if of else "" for of in (name, operation, line, dtype)
    )
    return Buffer(name, operation, line, tuple(shape), dtype, copies, *others)

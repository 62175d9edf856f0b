"""What another Triton does to the same questions: fit, LDS, registers, spills.

Frames in, frames out; no compiler, no GPU. Where async copy was left to the compiler its
setting is part of the answer, and versions are set side by side whatever they chose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import inert, records, tables

if TYPE_CHECKING:
    import pandas as pd

# Of a pair of rows, the gravest first.
VERDICTS = (
    "no longer compiles",
    "no longer fits",
    "more spills",
    "more LDS",
    "less LDS",
    "fewer spills",
    "other registers",
    "now fits",
    "now compiles",
    "asked of one alone",
    "unanswered",
    "unchanged",
)

_VERSIONS = ["Triton before", "Triton after"]

_FIGURES = {
    "lds_bytes": "LDS (bytes)",
    "registers": "registers",
    "spilled_registers": "spills",
}


def pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Set every question's row of the first Triton beside its row of each other.

    Args:
        rows: of `sweep.each`.
    Returns:
        one row per question and later Triton: what was asked; ``Triton before`` and
        ``Triton after``; ``status``, ``async copy`` and each figure with the suffixes
        `` before`` and `` after``; ``lds_limit``; and ``verdict``, one of `VERDICTS`.
    Raises:
        ValueError: the rows are of a single Triton.
    """
    import pandas as pd

    versions = list(rows["triton"].unique())
    if len(versions) < 2:
        found = ", ".join(versions) or "none"
        raise ValueError(f"an upgrade needs rows of two Tritons; these are of {found}")
    asked = [name for name in records.KEY if name not in ("triton", "compile_key", "async_copy")]
    rows = rows.drop_duplicates([*asked, "triton", "async_copy"])
    if rows.duplicated([*asked, "triton"]).any():
        # Both settings were asked: each is compared with itself.
        asked.append("async_copy")
    rows = tables.labelled(rows)
    answer = ["status", tables.ASYNC_COPY, *_FIGURES, "lds_limit"]
    before, *others = (
        rows.loc[rows["triton"] == version, [*asked, "tile", *answer]] for version in versions
    )
    paired = pd.concat(
        [
            before.merge(
                after, on=[*asked, "tile"], how="outer", suffixes=(" before", " after")
            ).assign(**{"Triton before": versions[0], "Triton after": version})
            for version, after in zip(versions[1:], others, strict=True)
        ],
        ignore_index=True,
    )
    paired["lds_limit"] = paired.pop("lds_limit before").fillna(paired.pop("lds_limit after"))
    return paired.assign(verdict=[_verdict(pair) for pair in paired.to_dict("records")])


def _verdict(pair: dict[str, Any]) -> str:
    """Say what became of one question."""
    import pandas as pd

    before, after = pair["status before"], pair["status after"]
    if pd.isna(before) or pd.isna(after):
        return "asked of one alone"
    if {before, after} & set(records.UNANSWERED):
        return "unanswered"
    if before != after and "compile_error" in (before, after):
        return "now compiles" if before == "compile_error" else "no longer compiles"
    if before != after and "ok" in (before, after):
        return "now fits" if after == "ok" else "no longer fits"
    for figure, less, more in (
        ("spilled_registers", "fewer spills", "more spills"),
        ("lds_bytes", "less LDS", "more LDS"),
        ("registers", "other registers", "other registers"),
    ):
        was, is_ = pair[f"{figure} before"], pair[f"{figure} after"]
        if pd.notna(was) and pd.notna(is_) and was != is_:
            return more if is_ > was else less
    return "unchanged"


def counts(paired: pd.DataFrame) -> pd.DataFrame:
    """Count the questions by verdict, per kernel, target and Triton, the gravest first."""
    counted = paired.pivot_table(
        index=["kernel", "target", *_VERSIONS],
        columns="verdict",
        values="lds_limit",
        aggfunc="size",
        fill_value=0,
    )
    counted = counted[[verdict for verdict in VERDICTS if verdict in counted]]
    counted["questions"] = counted.sum(axis=1)
    return counted.rename_axis(columns=None).reset_index()


def changes(paired: pd.DataFrame) -> pd.DataFrame:
    """List what changed, the gravest first, questions that changed alike as one row.

    Returns:
        per tile, warps and stage count: async copy and each figure as ``before -> after``,
        the limit, the verdict, and how many questions.
    """
    changed = paired[paired["verdict"] != "unchanged"]
    names = {"async copy": tables.ASYNC_COPY} | {name: column for column, name in _FIGURES.items()}
    table = changed[
        ["verdict", *_VERSIONS, "kernel", "target", "tile", "num_warps", "num_stages"]
    ].assign(
        **{
            name: _moved(changed[f"{column} before"], changed[f"{column} after"])
            for name, column in names.items()
        },
        **{"limit (bytes)": changed["lds_limit"]},
    )
    if changed["args"].notna().any():
        table["args"] = changed["args"]
    columns = list(table)
    table = table.groupby(columns, sort=False, dropna=False).size().rename("questions")
    return table.reset_index().sort_values(
        "verdict", key=lambda verdict: verdict.map(VERDICTS.index), kind="stable", ignore_index=True
    )


def _moved(before: pd.Series, after: pd.Series) -> list[str]:
    """Write each pair as ``1,024 -> 2,048``, and as one where nothing moved."""
    sides = [
        column.map(lambda v: f"{v:,}" if not isinstance(v, str) else v, na_action="ignore")
        .astype("string")
        .fillna("-")
        for column in (before, after)
    ]
    return [was if was == is_ else f"{was} -> {is_}" for was, is_ in zip(*sides, strict=True)]


def conclusion(paired: pd.DataFrame) -> str:
    """Sum the upgrade up in Markdown sentences, computed from the pairs."""
    paired = inert.frame(paired, inert.markdown)
    by = ["kernel", "target", *_VERSIONS]
    return "\n".join(
        f"- **{kernel} on {target}**, Triton {before} to {after}, {_sentences(of_kernel)}"
        for (kernel, target, before, after), of_kernel in paired.groupby(by, sort=False)
    )


def _sentences(paired: pd.DataFrame) -> str:
    import pandas as pd

    found = paired["verdict"].value_counts()
    listed = ", ".join(f"{verdict} {found[verdict]}" for verdict in VERDICTS if verdict in found)
    counted = f"{len(paired)} questions: {listed}."
    lost = paired[paired["verdict"] == "no longer fits"]
    if lost.empty:
        return counted
    worst = lost.loc[lost["lds_bytes after"].idxmax()]
    what = "" if pd.isna(worst["tile"]) else f"{worst['tile']}, "
    was, is_ = worst["async copy before"], worst["async copy after"]
    switched = f", async copy from {was} to {is_}" if was != is_ else ""
    return (
        f"{counted} The largest that no longer fits ({what}{worst['num_warps']} warps, "
        f"{worst['num_stages']} stages) goes from {worst['lds_bytes before']:,} to "
        f"{worst['lds_bytes after']:,} of {worst['lds_limit']:,} bytes{switched}."
    )

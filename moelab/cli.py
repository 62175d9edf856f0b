"""The command line: every command is a thin door to the module of the same idea."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which stage counts of Triton MoE GEMM kernels fit the LDS: told without a GPU.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Store = Annotated[Path, typer.Option("--store", help="Folder where rows live.")]
Jobs = Annotated[int | None, typer.Option("--jobs", help="Processes; every core if not given.")]

# Rows that are still read as a table; more are summed up.
_READABLE_ROWS = 60


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def sweep(
    kernel: Annotated[str, typer.Option(help="Kernels, comma-separated.")],
    target: Annotated[str, typer.Option(help="Targets, comma-separated; see `moelab targets`.")],
    tile: Annotated[
        str | None, typer.Option(help="Tiles MxNxK; the published rules' if not given.")
    ] = None,
    warps: Annotated[str | None, typer.Option(help="Warps per workgroup, with --tile.")] = None,
    stages: Annotated[str, typer.Option(help="Stage counts.")] = "1,2",
    async_copy: Annotated[
        str, typer.Option(help="on, off, both, or default as the compiler has it.")
    ] = "default",
    model: Annotated[
        str | None,
        typer.Option(help="Models, or all; the first served with each kernel if not given."),
    ] = None,
    layer: Annotated[str, typer.Option(help="1 (gather, SwiGLU), 2 (weighted), or both.")] = "1",
    tp: Annotated[str, typer.Option(help="Tensor parallelism.")] = "1",
    m: Annotated[str, typer.Option(help="Tokens before top-k.")] = "8704",
    full: Annotated[
        bool, typer.Option("--full", help="Compile to the end: registers, spills, occupancy.")
    ] = False,
    export: Annotated[Path | None, typer.Option(help="Write the rows to this .parquet.")] = None,
    store: Store = Path("rows"),
    jobs: Jobs = None,
    as_json: AsJson = False,
) -> None:
    """Tell the exact LDS of every configuration of a grid, without a GPU.

    \b
    Example:
      moelab sweep --kernel moe_gemm_a8w4 --target gfx950 --tile 128x512x256 \\
        --warps 8 --stages 1,2 --async-copy both
    """
    from . import plan, records
    from . import sweep as sweep_
    from .parameters import ParameterError

    try:
        configurations = plan.grid(
            kernels=kernel,
            targets=target,
            models=model,
            layers=layer,
            tp=tp,
            m=m,
            tiles=tile,
            warps=warps,
            stages=stages,
            async_copy=async_copy,
        )
        if jobs is not None and jobs < 1:
            raise ParameterError(f"--jobs {jobs}: give 1 or more, or leave it out for every core")
    except ParameterError as error:
        raise typer.BadParameter(str(error)) from None
    rows = sweep_.run(configurations, store, full=full, jobs=jobs)
    if export is not None:
        records.export(rows, export)
    if as_json:
        typer.echo(rows.to_json(orient="records", lines=True), nl=False)
    else:
        _show(rows)


def _show(rows: pd.DataFrame) -> None:
    """Print rows as a table, or counts where they are too many to read."""
    configuration = ["kernel", "target", "triton", "num_warps", "num_stages", "async_copy"]
    tile = rows[["block_m", "block_n", "block_k"]].astype(str).agg("x".join, axis=1)
    table = rows[configuration].assign(tile=tile)
    answer = rows[["lds_bytes", "lds_limit", "status"]]
    if len(rows) <= _READABLE_ROWS:
        problem = rows[["model", "layer", "tp", "m"]]
        varying = [name for name in problem if problem[name].nunique() > 1]
        typer.echo(problem[varying].join(table).join(answer).to_string(index=False, na_rep="-"))
    else:
        counts = table.join(answer).value_counts([*configuration[:2], "num_stages", "status"])
        typer.echo(counts.sort_index().to_string())
    for reason in rows.loc[rows["status"] == "compile_error", "reason"].unique()[:3]:
        typer.echo(f"\n{reason}", err=True)


@app.command()
def report(
    notebook: Annotated[str, typer.Argument(help="A notebook's name or path.")],
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="NAME VALUE", help="Set a parameter."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("reports"),
) -> None:
    """Run a notebook and render it as one HTML file that opens offline.

    \b
    Example:
      moelab report 01_stage_sweep -p targets gfx950 -p stages 1,2
    """


@app.command()
def targets(as_json: AsJson = False) -> None:
    """List the GPUs that can be asked about, with the source of every figure in --json.

    \b
    Example:
      moelab targets --json
    """
    from dataclasses import asdict

    from .targets import TARGETS

    if as_json:
        for target in TARGETS.values():
            typer.echo(json.dumps(asdict(target)))
        return
    typer.echo(f"{'target':<9}{'LDS limit':>10}  {'warp':>4}  {'TB/s':>5}  peak TFLOP/s, chips")
    for target in TARGETS.values():
        peaks = ", ".join(f"{name} {peak:g}" for name, peak in target.peak_tflops.items())
        typer.echo(
            f"{target.name:<9}{target.lds_limit:>10,}  {target.warp_size:>4}  "
            f"{target.bandwidth_tbps or '-':>5}  {peaks or '-'}; {', '.join(target.chips) or '-'}"
        )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, which GPU there is, and what will work.

    \b
    Example:
      moelab doctor
    """
    from . import health

    found = health.examine()
    typer.echo(json.dumps(found) if as_json else _lines(found))


def _lines(found: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", _lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<{24 - len(indent)}} {value}")
    return "\n".join(lines)

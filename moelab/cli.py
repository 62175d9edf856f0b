"""The command line: every command is a thin door to the module of the same idea."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__

if TYPE_CHECKING:
    import pandas as pd

# Rows that are still read as a table; more are counted.
_READABLE_ROWS = 60

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def _parquet(_context: Any, _parameter: Any, path: Path | None) -> Path | None:
    """Refuse an export's name before anything is compiled."""
    if path is not None and path.suffix != ".parquet":
        raise click.BadParameter(f"{path}: name it {path.with_suffix('.parquet')}")
    return path


@click.group(context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(__version__)
def app() -> None:
    """Which stage counts of Triton MoE GEMM kernels fit the LDS: told without a GPU."""


@app.command()
@click.option("--kernel", required=True, help="Kernels, comma-separated, or all.")
@click.option("--target", required=True, help="Targets, comma-separated; see `moelab targets`.")
@click.option("--tile", help="Tiles MxNxK[/SPLIT_K]; if not given, the published rules'.")
@click.option("--warps", help="Warps per workgroup, with --tile.")
@click.option("--stages", default="1,2", help="Stage counts.")
@click.option("--async-copy", default="default", help="on, off, both, or as the compiler has it.")
@click.option("--model", help="Models, or all; if not given, the first served with each kernel.")
@click.option("--layer", default="1", help="1 (gather, SwiGLU), 2 (weights, scatter), or all.")
@click.option("--tp", default="1", help="Tensor parallelism; all: 1,2,4,8.")
@click.option("--m", default="8704", help="Tokens before top-k; all: 512 to 15872.")
@click.option("--x-format", help="Of x, where the kernel takes several: fp8, mxfp8.")
@click.option("--y-format", default="bf16", help="Of y: bf16, fp32, fp8, mxfp8.")
@click.option("--scale-layout", default="rows", help="Of mx weight scales: rows, cdna4.")
@click.option("--full", is_flag=True, help="Compile to the end: registers, spills, occupancy.")
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    callback=_parquet,
    help="Write the rows to a .parquet.",
)
@click.option(
    "--store", default="rows", type=click.Path(path_type=Path), help="Folder where rows live."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; if not given, every core.")
@_as_json
def sweep(
    kernel: str,
    target: str,
    tile: str | None,
    warps: str | None,
    stages: str,
    async_copy: str,
    model: str | None,
    layer: str,
    tp: str,
    m: str,
    x_format: str | None,
    y_format: str,
    scale_layout: str,
    full: bool,
    export: Path | None,
    store: Path,
    jobs: int | None,
    as_json: bool,
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
            x_format=x_format,
            y_format=y_format,
            scale_layout=scale_layout,
        )
        rows = sweep_.run(configurations, store, full=full, jobs=jobs)
        if export is not None:
            records.export(rows, export)
    except ParameterError as error:
        raise click.UsageError(str(error)) from None
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(rows.to_json(orient="records", lines=True), nl=False)
    else:
        _show(rows)


def _show(rows: pd.DataFrame) -> None:
    """Print rows as a table, or counts where they are too many to read."""
    from . import tables

    rows = tables.labelled(rows)
    if len(rows) > _READABLE_ROWS:
        click.echo(tables.statuses(rows).to_string(index=False))
    else:
        problem = ["model", "layer", "tp", "m", "x_format", "y_format", "scale_layout"]
        varying = [name for name in problem if rows[name].nunique() > 1]
        shown = [*tables.TILING, "num_stages", tables.ASYNC_COPY]
        answer = ["lds_bytes", "lds_limit", "status", "registers", "spilled_registers"]
        table = rows[[*shown, *varying, *answer]].dropna(axis="columns", how="all")
        click.echo(table.to_string(index=False, na_rep="-"))
    if (rows["mode"] != rows["method"].replace("allocation", "lds")).any():
        click.echo("\nThis Triton's lowering was not checked: kernels compiled in full.", err=True)
    for reason in rows.loc[rows["status"] == "compile_error", "reason"].unique()[:3]:
        click.echo(f"\n{reason}", err=True)


@app.command()
@click.argument("notebook")
@click.option(
    "-p", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="Set a parameter."
)
@click.option(
    "--out", default="reports", type=click.Path(path_type=Path), help="Folder for the report."
)
def report(notebook: str, parameters: tuple[tuple[str, str], ...], out: Path) -> None:
    """Run a notebook and render it as one HTML file that opens offline.

    \b
    Example:
      moelab report 01_stage_sweep -p targets gfx950 -p stages 1,2
    """
    from . import report as report_
    from .parameters import ParameterError

    try:
        html = report_.render(notebook, {name: _value(text) for name, text in parameters}, out)
    except (ParameterError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from None
    except report_.ReportError as error:
        raise click.ClickException(str(error)) from None
    click.echo(html)


def _value(text: str) -> Any:
    """Read a value as papermill's command line does: numbers and booleans, else text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


@app.command()
@click.option("--target", required=True, help="One target; see `moelab targets`.")
@click.option(
    "--async-copy",
    type=click.Choice(["on", "off", "default"]),
    default="default",
    help="As the compiler has it, or for all launches.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    callback=_parquet,
    help="Write the rows to a .parquet.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; if not given, every core.")
@_as_json
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def capture(
    target: str,
    async_copy: str,
    export: Path | None,
    jobs: int | None,
    as_json: bool,
    command: tuple[str, ...],
) -> None:
    """Run a script or tests without a GPU, and tell the LDS of every Triton launch.

    The command runs unchanged, on tensors without values; what it prints goes to stderr.
    It stops where it reads a value back, and the report says where. Results are not
    compared, and torch.compile is off.

    Of an autotuner's configurations the first that fits counts as launched; the others are
    listed with 0 launches.

    Ends with 0 where every launch fits, 1 where one doesn't or doesn't compile, 2 after
    wrong use, 3 where nothing was launched.

    \b
    Example:
      moelab capture --target gfx950 -- pytest tests/test_moe.py
    """
    from . import capture as capture_
    from . import records

    try:
        captured = capture_.run(command, target, async_copy=async_copy, jobs=jobs)
        rows = capture_.frame(captured.rows)
        if export is not None:
            records.export(rows, export)
    except (ValueError, capture_.CaptureError) as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(rows.to_json(orient="records", lines=True), nl=False)
    else:
        click.echo(capture_.table(rows))
    click.echo(f"\n{capture_.summary(captured)}", err=True)
    raise SystemExit(3 if not captured.launched else 1 if captured.unfit else 0)


@app.command()
@_as_json
def targets(as_json: bool) -> None:
    """List the GPUs that can be asked about; --json has the source of every figure.

    \b
    Example:
      moelab targets --json
    """
    from dataclasses import asdict

    from .targets import TARGETS

    if as_json:
        for target in TARGETS.values():
            click.echo(json.dumps(asdict(target)))
        return
    click.echo(f"{'target':<9}{'LDS limit (bytes)':>18}  {'warp':>4}  {'TB/s':>5}  peak TFLOP/s")
    for target in TARGETS.values():
        peaks = ", ".join(f"{name} {peak:g}" for name, peak in target.peak_tflops.items())
        click.echo(
            f"{target.name:<9}{target.lds_limit:>18,}  {target.warp_size:>4}  "
            f"{target.bandwidth_tbps or '-':>5}  {peaks or '-':<38}  {', '.join(target.chips)}"
        )


@app.command()
@_as_json
def doctor(as_json: bool) -> None:
    """Say what is installed, which GPU there is, and what will work.

    \b
    Example:
      moelab doctor
    """
    from . import health

    found = health.examine()
    click.echo(json.dumps(found) if as_json else _lines(found))


def _lines(found: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", _lines(value, indent + "  ")]
        else:
            shown = "not installed" if value is None and indent else value
            lines.append(f"{indent}{name:<{20 - len(indent)}} {shown}")
    return "\n".join(lines)

"""The command line: every command is a thin door to the module of the same idea."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__, disk, inert, interrupts

if TYPE_CHECKING:
    import pandas as pd

    from .lds_map import Told
    from .regress import Comparison
    from .specs import Question

# Rows that are still read as a table; more are counted.
_READABLE_ROWS = 60

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
_full = click.option(
    "--full", is_flag=True, help="Compile to the end: registers, spills, occupancy."
)
_map = click.option("--map", "maps", is_flag=True, help="Tell which buffer takes which bytes, too.")
_store = click.option(
    "--store", default="rows", type=click.Path(path_type=Path), help="Folder where rows live."
)
_jobs = click.option(
    "--jobs", type=click.IntRange(min=1), help="Processes; if not given, every core."
)
_triton = click.option(
    "--triton",
    "tritons",
    multiple=True,
    metavar="VERSION|PYTHON",
    help="Another Triton, or a Python that has its own; several are set side by side.",
)

_markdown = click.option(
    "--markdown",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a summary as GitHub shows it, to $GITHUB_STEP_SUMMARY for one.",
)


def _parquet(_context: Any, _parameter: Any, path: Path | None) -> Path | None:
    """Refuse an export's name before anything is compiled."""
    if path is not None and path.suffix != ".parquet":
        raise click.BadParameter(f"{path}: name it {path.with_suffix('.parquet')}")
    return path


def _share(_context: Any, _parameter: Any, text: str) -> float:
    """Read ``3%`` or ``0.03``."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise click.BadParameter(f"{text}: give a share such as 3% or 0.03")
    return share


def _bytes(_context: Any, _parameter: Any, text: str | None) -> int | None:
    """Read ``8G``, ``512M`` or a number of bytes."""
    if text is None:
        return None
    from .sweep import LEAST_MEMORY

    number, unit = text[:-1], "KMGT".find(text[-1:].upper()) + 1
    try:
        size = int(float(number if unit else text) * 1024**unit)
    except (ValueError, OverflowError):
        size = 0
    if size < LEAST_MEMORY:
        least = f"{LEAST_MEMORY >> 20}M"
        raise click.BadParameter(
            f"{text}: give a size such as 8G; a compiler needs {least} to start"
        )
    return size


_memory = click.option(
    "--memory",
    metavar="SIZE",
    callback=_bytes,
    help="That a compile may take, such as 8G; if not given, half of this machine's.",
)


def _say(said: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print; what others wrote, in rows, files or paths, commands no terminal and no CI job."""
    click.echo(inert.printed(str(said)), err=err, nl=nl)


def _say_what_runs(what: str) -> None:
    """Name code that is about to run and is not moelab's: a file of rows is only read."""
    if not Path(what).resolve().is_relative_to(Path(__file__).resolve().parent):
        _say(f"moelab runs {inert.line(what)}", err=True)


_dask = click.option(
    "--dask",
    metavar="ADDRESS",
    help="Let a dask cluster compile: tcp://HOST:PORT, tls://HOST:PORT, or local.",
)


class _ClusterLost(click.ClickException):
    """A cluster's scheduler went away; what was finished is kept, and the same command goes on."""

    exit_code = 5


class _DiskFull(click.ClickException):
    """No room; what was finished is kept, and the same command goes on."""

    exit_code = 4


class _Interruptible(click.Group):
    """Ends with 130 after Ctrl-C and 143 after SIGTERM, as a shell expects, and says what is kept.

    Errors are inert. With 4 where a disk is full, be it the one that stdout goes to.
    """

    def invoke(self, context: click.Context) -> Any:
        with interrupts.terminable() as ended:
            try:
                try:
                    return super().invoke(context)
                finally:
                    # Python itself would do so after there is an exit code.
                    sys.stdout.flush()
            except click.ClickException as error:
                # Final to a type checker, as nobody else's exception should be changed.
                error.message = inert.printed(error.message)  # type: ignore[misc]
                raise
            except KeyboardInterrupt as stopped:
                _say(f"\n{str(stopped) or 'interrupted'}", err=True)
                raise SystemExit(128 + ended.by) from None
            except OSError as error:
                if not disk.is_full(error):
                    raise
                # What stdout still holds would be tried again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise _failed(error) from None


def _failed(error: Exception) -> click.ClickException:
    """Tell a full disk from what else the machine lacks."""
    if isinstance(error, OSError) and disk.is_full(error):
        return _DiskFull(str(error))
    return click.ClickException(str(error))


@click.group(cls=_Interruptible, context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(__version__)
def app() -> None:
    """Which Triton kernels fit the LDS, why not, and what fits instead: told without a GPU."""


@app.command()
@click.option("--kernel", required=True, help="Kernels, comma-separated, or all.")
@click.option("--target", required=True, help="Targets, comma-separated; see `moelab targets`.")
@click.option("--tile", help="Tiles MxNxK[/SPLIT_K][+WAY...]; if not given, the published rules'.")
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
@click.option("--fast-accum", is_flag=True, help="Leave fp8 sums to the matrix units (Hopper).")
@_full
@_map
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    callback=_parquet,
    help="Write the rows to a .parquet.",
)
@_triton
@_store
@_jobs
@_memory
@_dask
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
    fast_accum: bool,
    full: bool,
    maps: bool,
    export: Path | None,
    tritons: tuple[str, ...],
    store: Path,
    jobs: int | None,
    memory: int | None,
    dask: str | None,
    as_json: bool,
) -> None:
    """Tell the exact LDS of every configuration of a grid, without a GPU.

    What was finished is kept however a sweep ends, and the same command asks only for the rest.
    Ends with 0 where every configuration has its row, 1 where the machine lacks something, 2
    after wrong use, 4 where the disk is full, 5 where a cluster's scheduler is lost, 130 after
    Ctrl-C, 143 after SIGTERM.

    \b
    Example:
      moelab sweep --kernel moe_gemm_a8w4 --target gfx950 --tile 128x512x256 \\
        --warps 8 --stages 1,2 --async-copy both
    """
    from . import plan, records

    with _wrong_use():
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
            fast_accum=fast_accum,
        )
        rows, told = _asked(configurations, tritons, store, full, maps, jobs, memory, dask)
        if export is not None:
            records.export(rows, export)
    if as_json:
        _say(inert.json(rows.to_json(orient="records", lines=True)), nl=False)
    else:
        _show(rows)
        _show_maps(told)


@contextlib.contextmanager
def _wrong_use() -> Iterator[None]:
    """Tell what the user gave from what the machine lacks: exit codes 2 and 1.

    4 is room, 5 a lost cluster.
    """
    from .bench import MeasureError
    from .cluster import ClusterError, ClusterLostError
    from .launches import LaunchError
    from .parameters import ParameterError
    from .records import UnreadableError
    from .toolchain import ToolchainError

    try:
        yield
    except ClusterLostError as error:
        raise _ClusterLost(str(error)) from None
    except (ParameterError, LaunchError, UnreadableError) as error:
        raise click.UsageError(str(error)) from None
    except (OSError, ValueError, ToolchainError, MeasureError, ClusterError) as error:
        raise _failed(error) from None


def _asked(
    questions: Sequence[Question],
    tritons: tuple[str, ...],
    store: Path,
    full: bool,
    maps: bool,
    jobs: int | None,
    memory: int | None,
    dask: str | None = None,
) -> tuple[pd.DataFrame, list[Told]]:
    """Ask each Triton, and with ``maps`` also what async copy changed of each map."""
    from dataclasses import replace

    from . import lds_map, sweep

    limits: dict[str, Any] = {"jobs": jobs, "memory": memory, "dask": dask}
    rows = sweep.each(questions, store, tritons, full=full, maps=maps, **limits)
    if not maps:
        return rows, []
    switched = [of for of in questions if of.async_copy not in (None, False)]
    off = [replace(of, async_copy=False) for of in switched]
    return rows, lds_map.tell(rows, sweep.each(off, store, tritons, maps=True, **limits))


def _show(rows: pd.DataFrame) -> None:
    """Print rows as a table, or counts where they are too many to read."""
    from . import tables

    rows = tables.labelled(rows)
    if len(rows) > _READABLE_ROWS:
        _print(tables.statuses(rows))
    else:
        problem = ["model", "layer", "tp", "m", "x_format", "y_format", "scale_layout"]
        varying = [name for name in problem if rows[name].nunique() > 1]
        shown = [*tables.TILING, "num_stages", tables.ASYNC_COPY]
        answer = ["lds_bytes", "lds_limit", "status", *tables.RESOURCES]
        table = rows[[*shown, *varying, *answer]].dropna(axis="columns", how="all")
        _print(table)
    _remarks(rows)


def _print(table: pd.DataFrame) -> None:
    table = inert.frame(table)
    # pandas prints <NA> of nullable types whatever `na_rep` says.
    _say(table.astype(object).where(table.notna(), "-").to_string(index=False))


def _show_maps(told: list[Told]) -> None:
    from . import lds_map

    for each in told:
        _say(f"\n{each.title}\n{each.sentence}")
        if each.map.buffers:
            _print(lds_map.table(each.map.buffers))


def _remarks(rows: pd.DataFrame) -> None:
    """Say on stderr what a table has no room for."""
    if (rows["mode"].isin(["lds", "map"]) & (rows["method"] == "full")).any():
        _say("\nThis Triton's lowering was not checked: kernels compiled in full.", err=True)
    failed = rows[~rows["status"].isin(["ok", "out_of_lds", "out_of_tmem"])]
    for reason in failed["reason"].unique()[:3]:
        _say(f"\n{reason}", err=True)


def _as_sweep_has(*names: str) -> Callable[[click.Command], click.Command]:
    """Give a command options that `sweep` has, ahead of its own."""

    def give(command: click.Command) -> click.Command:
        given = [option for option in sweep.params if option.name in names]
        command.params = [*given, *command.params]
        return command

    return give


@_as_sweep_has(
    *("kernel", "target", "tile", "warps", "async_copy", "x_format", "y_format"),
    *("scale_layout", "fast_accum", "store", "jobs"),
)
@app.command()
@click.option("--stages", help="Stage counts of what is asked about; if not given, 2.")
@click.option("--model", help="Models, or all; if not given, all, or with --tile the first.")
@click.option("--layer", help="1, 2 or all; if not given, all, or with --tile 1.")
@click.option("--tp", help="Tensor parallelism; if not given, all, or with --tile 1.")
@click.option("--m", help="Tokens before top-k; if not given, all, or with --tile 8704.")
@click.option(
    "--launch",
    type=click.Path(path_type=Path),
    help="A LAUNCH.json, where --kernel is FILE.py:KERNEL: see `moelab lds`. Stages and warps are "
    "its own if not given.",
)
@click.option("--keep", help="What must stay: num_stages, block_k, block_n, ..., async_copy.")
@click.option(
    "--top",
    default=8,
    type=click.IntRange(min=1),
    help="Alternatives of each to show; fewer stages alone is shown too.",
)
@click.option("--all", "always", is_flag=True, help="Give what fits its alternatives too.")
@click.option(
    "--measured",
    type=click.Path(path_type=Path),
    help="Times to order by, .parquet or .csv: see moelab.advice.check_measured.",
)
@_as_json
def advise(
    kernel: str,
    target: str,
    tile: str | None,
    stages: str | None,
    model: str | None,
    layer: str | None,
    tp: str | None,
    m: str | None,
    launch: Path | None,
    keep: str | None,
    top: int,
    always: bool,
    measured: Path | None,
    store: Path,
    jobs: int | None,
    as_json: bool,
    **same: Any,
) -> None:
    """Name the nearest configurations that fit, in order of cost, without a GPU.

    Without --tile, of every tile that the published rules choose for the kernel. Launches
    that share a tile are asked as the one that needs the most LDS.

    \b
    Example:
      moelab advise --kernel moe_gemm_a8w4 --target gfx950 --tile 128x512x256 --warps 8
    """
    from . import advice, plan, search

    with _wrong_use():
        times = None if measured is None else advice.read_measured(measured)
        if launch is not None:
            _refuse_beside("--launch", *_OF_A_MODEL)
            _say_what_runs(kernel.rpartition(":")[0])
            asked: Sequence[Question] = plan.launches(
                kernel,
                launch,
                targets=target,
                stages=stages,
                warps=same["warps"],
                async_copy=same["async_copy"],
            )
        else:
            asked = plan.grid(
                kernels=kernel,
                targets=target,
                tiles=tile,
                models=model or (None if tile else "all"),
                layers=layer or ("1" if tile else "all"),
                tp=tp or ("1" if tile else "all"),
                m=m or ("8704" if tile else "all"),
                stages=stages or "2",
                **same,
            )
        for base, ranked in search.propose(
            asked, store, keep=keep, top=top, always=always, measured=times, jobs=jobs
        ):
            _propose(base, ranked, as_json)


_OF_A_MODEL = (
    *("tile", "model", "layer", "tp", "m", "x_format", "y_format", "scale_layout", "fast_accum"),
)


def _refuse_beside(option: str, *names: str) -> None:
    """Refuse options that another one leaves without a meaning."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is of moelab's own kernels; leave it out with {option}"
            )


@_as_sweep_has(
    *("kernel", "tile", "warps", "stages", "async_copy", "model", "layer", "tp", "m"),
    *("x_format", "scale_layout", "fast_accum", "export", "store", "jobs"),
)
@app.command()
@click.option("--workload", default="uniform", help="Routing: uniform, balanced, zipf, one_expert.")
@click.option("--seed", default=0, help="Of inputs and routing.")
@click.option(
    "--rounds",
    default=12,
    help="Turns of all configurations of a problem; with --ab the most, 24 if not given.",
)
@click.option("--repetitions", default=10, help="Samples of each in a round.")
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Let the GPUs of a dask cluster measure: tcp://HOST:PORT, tls://HOST:PORT, or local for "
    "every GPU of this machine.",
)
@click.option(
    "--resume",
    metavar="RUN",
    help="Go on with a run that was ended: only problems that it lacks are measured.",
)
@click.option(
    "--peers",
    is_flag=False,
    flag_value="all",
    default="",
    metavar="[NAMES]",
    help="Other people's kernels that take turns with ours; without names all.",
)
@click.option(
    "--ab",
    "sides",
    multiple=True,
    metavar="NAME=VALUE,...",
    help="Given twice: base, then candidate. What a side changes of the grid: stages (or most, "
    "most4, ...), tile, warps, group_m, triton, source; same: nothing.",
)
@click.option("--apart", is_flag=True, help="With --ab: each side in a process of its own.")
@click.option(
    "--threshold", default="3%", callback=_share, help="With --ab: slower by more is a regression."
)
@_markdown
@_as_json
def measure(
    workload: str,
    seed: int,
    rounds: int,
    repetitions: int,
    dask: str | None,
    resume: str | None,
    peers: str,
    sides: tuple[str, ...],
    apart: bool,
    threshold: float,
    markdown: Path | None,
    kernel: str,
    export: Path | None,
    store: Path,
    jobs: int | None,
    as_json: bool,
    **same: Any,
) -> None:
    """Time what fits on the GPU at hand, after checking its result and its LDS.

    Configurations of a problem take turns in random order; each sample follows a flush of
    the L2. Beside each time stands what compute and bandwidth allow, measured in the same run.
    With --layer all, both layers are timed together too.

    Launches are made by a process of their own. One that crashes it, hangs it or loses it the
    GPU is tried once more, alone; its neighbours are measured anew. A run that was ended, with
    Ctrl-C for example, says how --resume goes on with it. --dask gives each problem to one of
    many GPUs of a kind.

    --peers sets the grouped GEMMs of PyTorch, triton_kernels and DeepGEMM beside ours, as far
    as they are installed. They know no SwiGLU, bias or routing weights, so that ours leave
    them out too; each is timed alone, and with the gather, padding and scatter that ours do.

    --ab asks whether a candidate is slower than a base. Every configuration of the grid is a
    cell; both sides take turns in it until it is decided, for --rounds at most (if not given,
    24). It ends as `moelab compare` does, which gives the same verdict of the rows:
    rows@side=base against rows@side=candidate. Where Triton or source differ, each side has a
    process of its own.

    \b
    Example:
      moelab measure --kernel moe_gemm_a8w8 --model "Qwen3-235B-A22B" \\
        --tile 128x128x128,128x256x128 --warps 8 --stages 1,2,3,4 --export measured.parquet
      moelab measure --kernel moe_gemm_a8w8 --layer all --m 512,8704 \\
        --ab stages=1 --ab stages=most
      moelab measure --kernel moe_gemm_a8w4 --ab source=../before --ab same
      moelab measure --kernel moe_gemm_a8w8 --tile 128x256x128+tma --warps 8 --stages 3 \\
        --fast-accum --peers torch,triton_kernels
    """
    from dataclasses import replace

    from . import bench, measurements, plan, records, regress
    from . import peers as others

    if sides:
        _refuse_beside_ab(sides, peers)
        same["stages"] = same["stages"] if _was_given("stages") else "2"
    else:
        for name in ("apart", "threshold", "markdown"):
            if _was_given(name):
                raise click.UsageError(f"--{name} is of --ab BASE --ab CANDIDATE; give these too")
        if dask is not None and jobs is not None:
            raise click.UsageError(
                "--jobs is of this machine; a cluster compiles with the threads of its workers, "
                "`dask worker --nthreads`"
            )
    guarded = _wrong_use_or_nothing_measured() if sides else _wrong_use()
    with guarded, contextlib.ExitStack() as opened:
        devices = None if dask is None else opened.enter_context(bench.devices(dask))
        here = bench.gpu() if devices is None else devices.gpu
        asked = plan.grid(
            kernels=kernel,
            targets=here.target.name,
            **{_PLURAL.get(name, name): value for name, value in same.items()},
        )
        if sides:
            compared = _measured_ab(
                asked,
                sides,
                store,
                export,
                markdown,
                workload=workload,
                seed=seed,
                repetitions=repetitions,
                threshold=threshold,
                apart=apart,
                jobs=jobs,
                **({"rounds": rounds} if _was_given("rounds") else {}),
            )
            _say(inert.json(regress.as_json(compared)) if as_json else regress.text(compared))
            raise SystemExit(compared.exit_code)
        if names := others.named(peers):
            asked = [replace(of, problem=others.plain(of.problem)) for of in asked]
            others.check(names, asked)
        rows = bench.measure(
            asked,
            store,
            workload=workload,
            seed=seed,
            rounds=rounds,
            repetitions=repetitions,
            jobs=jobs,
            peers=names,
            resume=resume,
            device=devices,
        )
        if export is not None:
            records.export(rows, export)
    if as_json:
        _say(inert.json(rows.to_json(orient="records", lines=True)), nl=False)
    else:
        _print(measurements.table(rows))
        _remarks(rows)
    _say("\n" + measurements.tally(rows), err=as_json)


def _was_given(name: str) -> bool:
    """Say whether an option of the running command stands on its command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def _refuse_beside_ab(sides: Sequence[str], peers: str) -> None:
    if len(sides) != 2:
        raise click.UsageError(
            f"--ab is given {len(sides)} times; give it twice, for example --ab stages=1 "
            "--ab stages=most"
        )
    if peers:
        raise click.UsageError("--peers takes turns with one grid; leave it out with --ab")
    for name in ("resume", "dask"):
        if _was_given(name):
            raise click.UsageError(f"--{name} is of one grid; leave it out with --ab")


@contextlib.contextmanager
def _wrong_use_or_nothing_measured() -> Iterator[None]:
    """End with 2 whatever it is but a full disk or an interrupt: 1 is a regression."""
    try:
        with _wrong_use():
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted: no verdict; what was finished is in --store"
        ) from None
    except (click.UsageError, _DiskFull):
        raise
    except click.ClickException as error:
        raise click.UsageError(error.message) from None


def _measured_ab(
    asked: Sequence[Any],
    sides: Sequence[str],
    store: Path,
    export: Path | None,
    markdown: Path | None,
    **how: Any,
) -> Comparison:
    """Measure two sides, keep what was asked for, and compare them."""
    from . import ab, records, regress

    _check_markdown(markdown)
    base, candidate = map(ab.Side.parse, sides)
    rows = ab.measure(asked, base, candidate, store, **how)
    if export is not None:
        records.export(rows, export)
    compared = ab.judged(rows, how["threshold"])
    if markdown is not None:
        disk.replace(markdown, regress.markdown(compared))
    return compared


def _check_markdown(markdown: Path | None) -> None:
    """Refuse a summary's name that is one of rows, or in a folder that is not there."""
    if markdown is not None and not markdown.parent.is_dir():
        raise ValueError(f"--markdown {markdown}: there is no folder {markdown.parent}")
    if markdown is not None and markdown.suffix in (".parquet", ".jsonl"):
        raise ValueError(f"--markdown {markdown}: name it {markdown.with_suffix('.md')}")


@app.command()
@click.option("--kernel", default="all", help="MoE GEMMs, comma-separated, or all.")
@click.option("--model", help="Models; if not given, the four of benchmarks/stage_sweep.py.")
@click.option("--layer", default="all", help="1, 2 or all.")
@click.option("--tp", default="1,4", help="Tensor parallelism.")
@click.option("--m", default="512,2560,8704,15872", help="Tokens before top-k.")
@click.option("--x-format", help="Of x, where the kernel takes several: fp8, mxfp8.")
@click.option("--scale-layout", default="rows", help="Of mx weights: see `moelab sweep`.")
@click.option("--fast-accum", is_flag=True, help="With sums left to Hopper's fp8 tensor cores.")
@click.option("--workload", default="uniform", help="Routing: uniform, balanced, zipf, one_expert.")
@click.option("--seed", default=0, help="Of inputs and routing.")
@click.option(
    "--rows",
    "measured",
    type=click.Path(path_type=Path),
    help="Measure nothing: take a store's measured rows, or a .parquet of them.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A .json; if not given, the target's in $MOELAB_TUNED, which launchers read.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    callback=_parquet,
    help="Write every measured row to a .parquet.",
)
@_store
@_jobs
@_as_json
def tune(
    model: str | None,
    workload: str,
    seed: int,
    measured: Path | None,
    out: Path | None,
    export: Path | None,
    store: Path,
    jobs: int | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Find the best tile, warps, stages and program order on the GPU at hand, and keep them.

    Launchers take what is kept where no tile is given. Few samples of all that can win are
    followed by many of the best; the published rules' tile is timed beside them.

    \b
    Example:
      moelab tune --kernel moe_gemm_a8w8 --model "Qwen3-235B-A22B" --out tuned/tuned_sm_90.json
    """
    from . import bench, records, tune, tuned
    from . import targets as targets_

    with _wrong_use():
        if measured is None:
            target = bench.gpu().target.name
            path = _tuned_path(target, out)
            cells = tune.cells(
                target=target,
                models=model or tune.MODELS,
                **{_PLURAL.get(name, name): value for name, value in asked.items()},
            )
            rows = tune.run(cells, store, jobs=jobs, workload=workload, seed=seed)
        else:
            rows = records.read(measured).dropna(subset=["time_us"])
            if rows["target"].nunique() != 1:
                there = ", ".join(rows["target"].unique()) or "none"
                raise ValueError(f"{measured}: measured rows of one target are wanted, not {there}")
            # What rows say is part of the file's name.
            target = targets_.get(rows["target"].iloc[0]).name
            path = _tuned_path(target, out)
        if export is not None:
            records.export(rows, export)
        tuned.save(tuned.winners(rows), target, path)
        gains = tuned.gains(rows)
    if as_json:
        _say(inert.json(gains.to_json(orient="records", lines=True)), nl=False)
    else:
        _print(tuned.mean_gains(gains).round(2))
        _say(f"\n{path}", err=True)


def _tuned_path(target: str, out: Path | None) -> Path:
    """Name the file before anything is measured."""
    from . import tuned

    if out is None and not os.environ.get("MOELAB_TUNED"):
        raise click.UsageError(
            f"give --out, such as tuned/{tuned.path_of(target).name}, or set MOELAB_TUNED to the "
            "folder that launchers are to read"
        )
    if out is not None and out.suffix != ".json":
        raise click.UsageError(f"--out {out}: name it {out.with_suffix('.json')}")
    return out or tuned.path_of(target)


# What the command line calls in the singular.
_PLURAL = {"kernel": "kernels", "tile": "tiles", "model": "models", "layer": "layers"}


def _propose(base: pd.Series, ranked: pd.DataFrame, as_json: bool) -> None:
    """Print a configuration and its alternatives."""
    import pandas as pd

    from . import advice, tables

    if as_json:
        rows = pd.concat([tables.labelled(base.to_frame().T), ranked])
        rows = rows.drop(columns=tables.ASYNC_COPY)
        _say(inert.json(rows.to_json(orient="records", lines=True)), nl=False)
        return
    _say(advice.verdict(ranked, base))
    if len(ranked):
        if not pd.isna(base["model"]):
            _say("Of {model}, layer {layer}, TP {tp}, M {m}:".format(**base))
        shown = ["changed", "tile", "num_warps", "num_stages", tables.ASYNC_COPY, "lds_bytes"]
        shown += ["free_bytes", "registers", "spilled_registers", "workgroups_per_cu"]
        shown += ["warps_per_simd", "expected_cost", "measured_time_us", "ordered_by"]
        table = inert.frame(ranked[shown]).dropna(axis="columns", how="all")
        _say(table.to_string(index=False, na_rep="-", float_format="{:.2f}".format))
    _say()


@app.command()
@click.argument("kernel", metavar="FILE.py:KERNEL")
@click.argument("launch", metavar="LAUNCH.json", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="Targets, comma-separated; see `moelab targets`.")
@click.option("--stages", help="Stage counts; if not given, the launch's or Triton's default.")
@click.option("--warps", help="Warps per workgroup; likewise.")
@click.option("--async-copy", default="default", help="on, off, both, or as the compiler has it.")
@_full
@_map
@_triton
@_store
@_jobs
@_memory
@_as_json
def lds(
    kernel: str,
    launch: Path,
    target: str,
    stages: str | None,
    warps: str | None,
    async_copy: str,
    full: bool,
    maps: bool,
    tritons: tuple[str, ...],
    store: Path,
    jobs: int | None,
    memory: int | None,
    as_json: bool,
) -> None:
    """Tell the exact LDS of anybody's kernel, without a GPU.

    It runs the file that the kernel is in, as importing it does: give none that you would not
    run. LAUNCH.json is only read.

    KERNEL is a triton.jit function, autotuned or not, in a file or as package.module:KERNEL.
    LAUNCH.json gives every parameter a type or a constant:

    \b
      {"args": {"x_ptr": "*fp8e4nv:16", "k": "i32:16", "BLOCK_K": 128},
       "options": {"num_warps": 8, "waves_per_eu": 1}}

    \b
    Example:
      moelab lds matmul.py:matmul_kernel launch.json \\
        --target gfx950,sm_90 --stages 1,2,3 --warps 4,8
    """
    from . import plan, tables

    _say_what_runs(kernel.rpartition(":")[0])
    with _wrong_use():
        questions = plan.launches(
            kernel, launch, targets=target, stages=stages, warps=warps, async_copy=async_copy
        )
        rows, told = _asked(questions, tritons, store, full, maps, jobs, memory)
    if as_json:
        _say(inert.json(rows.to_json(orient="records", lines=True)), nl=False)
    else:
        _print(tables.of_launches(rows))
        _remarks(rows)
        _show_maps(told)


@app.command()
@click.argument("notebook")
@click.option(
    "-p", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="Set a parameter."
)
@click.option(
    "--out", default="reports", type=click.Path(path_type=Path), help="Folder for the report."
)
@click.option("--name", default="", help="Of its files; if not given, the notebook's.")
def report(notebook: str, parameters: tuple[tuple[str, str], ...], out: Path, name: str) -> None:
    """Run a notebook and render it as one HTML file that opens offline.

    \b
    Example:
      moelab report 01_stage_sweep -p targets gfx950 -p stages 1,2
    """
    from . import report as report_
    from .parameters import ParameterError

    try:
        values = {parameter: _value(text) for parameter, text in parameters}
        html = report_.render(notebook, values, out, name=name)
    except (ParameterError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from None
    except (OSError, report_.ReportError) as error:
        raise _failed(error) from None
    _say(html)


def _value(text: str) -> Any:
    """Read a value as papermill's command line does: numbers and booleans, else text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


@app.group("toolchain")
def toolchain_() -> None:
    """Keep several Tritons side by side, away from the environment.

    \b
    Example:
      moelab toolchain install 3.7.1
      moelab sweep --kernel moe_gemm_a8w4 --target gfx950 --triton 3.7.1 --triton 3.9.0
    """


@toolchain_.command()
@click.argument("versions", nargs=-1, required=True)
def install(versions: tuple[str, ...]) -> None:
    """Install Tritons, each in a folder of its own.

    \b
    Example:
      moelab toolchain install 3.7.1
    """
    from . import toolchain

    for version in versions:
        with _wrong_use():
            chosen = toolchain.install(version)
        _say(f"triton {version}: {chosen.folder}")


@toolchain_.command()
@click.argument("version")
def remove(version: str) -> None:
    """Delete an installed Triton.

    \b
    Example:
      moelab toolchain remove 3.7.1
    """
    from . import toolchain

    with _wrong_use():
        _say(f"deleted {toolchain.remove(version)}")


@toolchain_.command("list")
@_as_json
def list_(as_json: bool) -> None:
    """List the Tritons that --triton takes by version.

    \b
    Example:
      moelab toolchain list
    """
    from . import toolchain

    for each in (toolchain.find(), *toolchain.installed()):
        where = str(each.folder or "this environment")
        found = {"triton": each.name, "python": each.python, "where": where}
        _say(inert.json(json.dumps(found)) if as_json else f"{each.name:<10} {where}")


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

    The command runs unchanged and may do whatever it does: give none that you would not run. It
    runs on tensors without values; what it prints goes to stderr.
    It stops where it reads a value back, and the report says where. Results are not
    compared, and torch.compile is off.

    Of an autotuner's configurations the first that fits counts as launched; of the others
    those that fit are rows of --json and --export alone.

    Ends with 0 where every launch fits, 1 where one doesn't or doesn't compile, 2 after
    wrong use, 3 where nothing was launched or a signal ended the command early, 4 where the
    disk is full.

    \b
    Example:
      moelab capture --target gfx950 -- pytest tests/test_moe.py
    """
    import shlex

    from . import capture as capture_
    from . import records

    _say_what_runs(shlex.join(command))
    try:
        captured = capture_.run(command, target, async_copy=async_copy, jobs=jobs)
        rows = capture_.frame(captured.rows)
        if export is not None:
            records.export(rows, export)
    except (ValueError, capture_.CaptureError) as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise _failed(error) from None
    if as_json:
        _say(inert.json(rows.to_json(orient="records", lines=True)), nl=False)
    else:
        _say(capture_.table(rows))
    _say(f"\n{capture_.summary(captured)}", err=True)
    if captured.unfit:
        raise SystemExit(1)
    raise SystemExit(3 if captured.exit_code < 0 or not captured.launched else 0)


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
            _say(json.dumps(asdict(target)))
        return
    _say(f"{'target':<9}{'LDS limit (bytes)':>18}  {'warp':>4}  {'TB/s':>5}  peak TFLOP/s")
    for target in TARGETS.values():
        peaks = ", ".join(f"{name} {peak:g}" for name, peak in target.peak_tflops.items())
        _say(
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
    _say(inert.json(json.dumps(found)) if as_json else _lines(found))


def _lines(found: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", _lines(value, indent + "  ")]
        else:
            shown = "not installed" if value is None and indent else value
            lines.append(f"{indent}{name:<{20 - len(indent)}} {shown}")
    return "\n".join(lines)


def _comma_separated(_context: Any, _parameter: Any, text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


@app.command()
@click.option(
    "--format",
    "format_",
    required=True,
    type=click.Choice(["vllm", "sglang", "aiter"]),
    help="Who loads them.",
)
@click.option("--target", required=True, help="One target; see `moelab targets`.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the files; made if missing.",
)
@click.option("--rows", "source", default="rows", help="A sweep's store, or its .parquet.")
@click.option("--kernel", callback=_comma_separated, help="Kernels; if not given, all it takes.")
@click.option("--model", callback=_comma_separated, help="Models; if not given, all in the rows.")
@click.option("--tp", callback=_comma_separated, help="Tensor parallelism; if not given, every.")
@click.option("--triton", callback=_comma_separated, help="Which Triton's rows.")
@click.option("--async-copy", callback=_comma_separated, help="Which rows: on or off.")
@click.option("--x-format", callback=_comma_separated, help="Which rows; none: as the kernel has.")
@click.option("--y-format", callback=_comma_separated, help="Which rows.")
@click.option("--scale-layout", callback=_comma_separated, help="Which rows.")
@click.option("--device-name", help="As the engine calls the GPU; if not given, the target's.")
@click.option("--force", is_flag=True, help="Replace files that differ.")
def export(
    format_: str,
    target: str,
    out: Path,
    source: str,
    device_name: str | None,
    force: bool,
    **wanted: list[str],
) -> None:
    """Write the configurations chosen from a sweep as files that an engine loads.

    \b
    Example:
      moelab export --format vllm --target gfx950 --rows rows --out configs
    """
    from . import exports, records, targets

    try:
        targets.get(target)
        rows = exports.select(
            records.read(source),
            format_,
            target,
            **{column: values for column, values in wanted.items() if values},
        )
        files = exports.spell(format_, rows, device_name)
        paths = exports.write(files, rows, out, source=source, force=force)
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise _failed(error) from None
    for file, path in zip(files, paths, strict=True):
        _say(path)
        if file.left_out:
            reasons = ", ".join(dict.fromkeys(file.left_out.values()))
            _say(f"  left out: {', '.join(file.left_out)} ({reasons})", err=True)


@app.command()
@click.argument("baseline")
@click.argument("candidate")
@click.option("--threshold", default="3%", callback=_share, help="Slower by more is a regression.")
@_markdown
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a report as one file that opens offline.",
)
@_as_json
def compare(
    baseline: str,
    candidate: str,
    threshold: float,
    markdown: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Say what regressed between two sets of rows: fit, resources, speed.

    Each is a store's folder, a .parquet export, or a baseline's name: a file in
    $MOELAB_BASELINES, or shipped, such as h200_stage_sweep. SOURCE@COLUMN=VALUE,... takes some
    of its rows, SOURCE@stages=most of each tile those with the most stages that fit. Cells are
    matched by kernel, problem and target, and by what else tells rows apart. Speed is judged where
    both sides took turns in one run; another run's times are listed, and prove nothing.

    Ends with 0 where nothing regressed, 1 where something did, 2 after wrong use or where a row
    is damaged, 3 where nothing regressed but something is inconclusive, 4 where the disk is full.

    \b
    Example:
      moelab compare before.parquet after.parquet --markdown summary.md
      moelab compare h200_stage_sweep@num_stages=1 h200_stage_sweep@num_stages=3
      moelab compare before.parquet after.parquet --html report.html
    """
    from . import baselines, regress
    from . import report as report_

    try:
        _check_markdown(markdown)
        if html is not None:
            report_.require_report_or_nothing(html)
        compared = regress.compare(
            baselines.read(baseline), baselines.read(candidate), threshold=threshold
        )
        if html is not None:
            given = {"baseline": baseline, "candidate": candidate, "threshold": threshold}
            report_.render_to("06_regression_report", given, html)
        if markdown is not None:
            disk.replace(markdown, regress.markdown(compared))
    except (ValueError, OSError, report_.ReportError) as error:
        words = inert.line(error, inert.LONG)
        if isinstance(error, OSError) and disk.is_full(error):
            raise _DiskFull(words) from None
        raise click.UsageError(words) from None
    _say(inert.json(regress.as_json(compared)) if as_json else regress.text(compared))
    raise SystemExit(compared.exit_code)

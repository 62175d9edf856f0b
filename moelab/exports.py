"""Chosen configurations as the files that serving engines load.

`select` keeps rows of one kind, `choose` takes one configuration of all that may serve an
entry, and `vllm`, `sglang` and `aiter` spell it as their loaders read it. The files' format
leaves no room for where a choice comes from: that lies beside each, as
``<stem>.provenance.json``, which no loader asks for.

Bytes of LDS are those of moelab's kernels. The engines launch kernels of their own with
the same tile, warps and stages; what those need can differ, and the provenance says so.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, disk, problems, records, tables, targets
from .kernels.launch import AMD_OPTIONS
from .specs import Problem, Target, Tile

if TYPE_CHECKING:
    import pandas as pd

# What an entry of a file fixes, and what tells apart the problems that it serves.
CONFIGURATION = ["block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages"]
_PROBLEM = ["model", "layer", "tp", "m"]

# Of these a file takes one value: an entry has no place to tell two apart.
_ONE_OF = ("triton", "async_copy", "x_format", "y_format", "scale_layout")

RULE = (
    "chosen by fit, not measured: of the configurations that every row of an entry says fit, "
    "the one asked for most of its problems, then the published tile, then the most stages, "
    "then the largest tile, then the least LDS"
)
CAUTION = (
    "lds_bytes are those of moelab's kernels; the engine launches its own kernel with the "
    "same tile, warps and stages, and that kernel's LDS can differ"
)

# Names in engines' own files: vLLM's fused_moe/configs, and for MI355X SGLang's
# triton_3_6_0/E=384,N=256,device_name=AMD_Instinct_MI355X,dtype=int4_w4a16.json.
DEVICE_NAMES = {
    "gfx942": "AMD_Instinct_MI300X",
    "gfx950": "AMD_Instinct_MI355X",
    "sm_80": "NVIDIA_A100-SXM4-80GB",
    "sm_86": "NVIDIA_A10",
    "sm_89": "NVIDIA_L40S",
    "sm_90": "NVIDIA_H100_80GB_HBM3",
    "sm_100": "NVIDIA_B200",
    "sm_120": "NVIDIA_GeForce_RTX_5090",
}

# dtype and block_shape in vLLM's and SGLang's names. Both know of fp8_w8a8, int and 16-bit
# types; of mxfp4 vLLM says that it looks for no file (`_get_config_dtype_str`).
_FP8_NAMES: dict[str, tuple[str, list[int] | None]] = {
    "moe_gemm_a8w8": ("fp8_w8a8", None),
    "moe_gemm_a8w8_blockscale": ("fp8_w8a8", [128, 128]),
}

# What aiter calls the operands of each kernel: moe_op_gemm_* in lower case.
_AITER_NAMES = {
    "moe_gemm_a8w4": "A8W4",
    "moe_gemm_a4w4": "A4W4",
    "moe_gemm_a8w8": "A8W8",
    "moe_gemm_a8w8_blockscale": "A8W8_BLOCKSCALE",
}
# What its fused MoE calls them.
_AITER_FUSED = {"moe_gemm_a8w8": "FP8_W8A8", "moe_gemm_a4w4": "MX_FP4"}
_AITER_BUCKETS = {"small_M": (0, 256), "medium_M": (256, 1024), "large_M": (1024, 1 << 62)}

# Kernels that each format has a place for.
FORMATS: dict[str, Collection[str]] = {
    "vllm": _FP8_NAMES,
    "sglang": _FP8_NAMES,
    "aiter": _AITER_NAMES,
}


class ExportError(ValueError):
    """The rows don't say what a file is to hold, or a file is in the way."""


@dataclass
class File:
    """One file for an engine, not yet written.

    Args:
        path: below the folder of the export.
        text: what the engine reads.
        entries: where each entry comes from, by its key in the file.
        left_out: why there is no entry for what the rows ask about, by its key.
    """

    path: Path
    text: str = ""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def select(rows: pd.DataFrame, format: str, target: str, **wanted: Collection[str]) -> pd.DataFrame:
    """Keep the rows of models' layers that an export is about.

    Args:
        rows: as `records.read` gives them; of equal questions the last counts.
        format: one of `FORMATS`; kernels that it has no place for are left out.
        wanted: values to keep, by column and as text: numbers as digits, async copy as on
            or off, what is missing as none. A column that is not named keeps all.
    Raises:
        ExportError: no row is left, or the rows left are of several kinds, such as two
            Tritons; the message has what there is.
    """
    kernels = FORMATS[format]
    if unknown := [name for name in wanted.get("kernel", ()) if name not in kernels]:
        raise ExportError(
            f"{format} has no place for {', '.join(unknown)}; it takes {', '.join(kernels)}"
        )
    # A peer's kernel has no configuration.
    of_models = rows[rows["model"].isin(list(problems.MODELS)) & rows["peer"].isna()]
    kept = of_models[of_models["target"] == target]
    if kept.empty:
        there = _listed(of_models["target"]) or "none at all"
        raise ExportError(f"no rows of a model's layers on {target}; those there are on: {there}")
    there = _listed(kept["kernel"])
    kept = kept[kept["kernel"].isin(list(kernels))]
    if kept.empty:
        raise ExportError(
            f"{format} has no place for {there}, which the rows on {target} are of; "
            f"it takes {', '.join(kernels)}"
        )
    for column, values in wanted.items():
        there = _listed(kept[column])
        kept = kept[_words(kept[column]).isin(list(values))]
        if kept.empty:
            raise ExportError(f"no rows with {column} {', '.join(values)}; there are {there}")
    # Of a kernel that has changed since, the store has the rows of before, too.
    asked = [column for column in records.KEY if column != "compile_key"]
    kept = kept.drop_duplicates(asked, keep="last")
    for column in _ONE_OF:
        if kept[column].nunique(dropna=False) > 1:
            raise ExportError(
                f"the rows have several {column}: {_listed(kept[column])}; "
                f"choose one with --{column.replace('_', '-')}"
            )
    return kept


def _words(column: pd.Series) -> pd.Series:
    """Spell a column's values as they are asked for."""
    if column.name == "async_copy":
        column = column.map({True: "on", False: "off"})
    return column.astype("string").fillna("none")


def _listed(column: pd.Series) -> str:
    return ", ".join(sorted(_words(column).unique()))


def choose(rows: pd.DataFrame) -> pd.DataFrame:
    """Choose one configuration for one entry, as `RULE` says.

    A measured time, once rows have one, belongs first in the ranking.

    Args:
        rows: all that the entry is to serve, of one kernel.
    Returns:
        the rows of the configuration chosen; none where each was refused by some row.
    """
    fitting = [
        of_one for _, of_one in rows.groupby(CONFIGURATION) if (of_one["status"] == "ok").all()
    ]
    return max(fitting, key=_rank, default=rows.iloc[:0])


def _rank(of_one: pd.DataFrame) -> tuple[int, ...]:
    first = of_one.iloc[0]
    return (
        _problems(of_one),
        any(map(_is_published, of_one.to_dict("records"))),
        first["num_stages"],
        first["block_m"] * first["block_n"] * first["block_k"],
        -of_one["lds_bytes"].max(),
    )


def _is_published(row: dict[str, Any]) -> bool:
    problem = Problem(**{item.name: row[item.name] for item in fields(Problem)})
    tile = tables.tile_of(row)
    return problems.ruled_tile(row["kernel"], problem) == (tile, row["num_warps"])


def _problems(rows: pd.DataFrame) -> int:
    return len(rows[_PROBLEM].drop_duplicates())


def _serves(chosen: pd.DataFrame, rows: pd.DataFrame) -> bool:
    """Tell whether a choice was compiled for every problem of some rows, and fits."""
    return 0 < _problems(chosen) == _problems(rows)


def spell(format: str, rows: pd.DataFrame, device_name: str | None = None) -> list[File]:
    """Make a format's files, see `vllm`, `sglang` and `aiter`."""
    if format == "aiter":
        if device_name:
            raise ExportError("aiter names its files by architecture: leave --device-name out")
        return aiter(rows)
    return (vllm if format == "vllm" else sglang)(rows, device_name)


def vllm(rows: pd.DataFrame, device_name: str | None = None) -> list[File]:
    """Spell choices as vLLM reads them from the folder ``VLLM_TUNED_CONFIG_FOLDER``.

    It opens ``E=,N=,device_name=,dtype=[,block_shape=[128,128]].json``, where N is a
    shard's intermediate size, takes out ``triton_version``, reads every other key as a
    number of tokens, and launches the nearest one's value, all keys of it, for both layers
    (vllm 13cb3e4437, fused_moe.py ``get_config_file_name``, ``get_moe_configs``,
    ``invoke_fused_moe_triton_kernel``). So an entry is a configuration that was compiled
    for both layers of every problem it serves, and fits them all. Fewer tokens than any key
    take the least one's value: sweep those that are served too.

    Args:
        rows: as `select` leaves them.
        device_name: vLLM's name of the GPU; None is the target's in `DEVICE_NAMES`.
    Raises:
        ExportError: no entry can be made; the message says what to sweep.
    """
    device = _device_name(rows, device_name)
    if "H200" in device.split("_"):
        # As vLLM names every variant.
        device = "NVIDIA_H200"
    files = []
    for stem, of_file in _by_shape(rows, device):
        file = File(Path(stem.replace(" ", "") + ".json"))
        body: dict[str, Any] = {"triton_version": of_file["triton"].iloc[0]}
        for m, of_m in of_file.groupby("m"):
            chosen = choose(of_m)
            if set(of_m["layer"]) != {1, 2} or not _serves(chosen, of_m):
                file.left_out[str(m)] = "no configuration is known to fit both layers"
                continue
            body[str(m)] = _entry(chosen)
            file.entries[str(m)] = _origin(chosen)
        files.append(_filled(file, _json(body)))
    return files


def sglang(rows: pd.DataFrame, device_name: str | None = None) -> list[File]:
    """Spell choices as SGLang reads them from the folder ``SGLANG_MOE_CONFIG_DIR``.

    It opens ``configs/triton_3_6_0/`` and vLLM's name with a blank in ``[128, 128]``, for
    layer 2 ending in ``_down``, reads every key as a number of tokens and takes the nearest.
    Both layers share one sorting of the tokens, thus BLOCK_SIZE_M. A Triton without the
    file takes the newest folder that has it, for which every folder's name must be numbers
    (sglang 0.5.23, moe_runner/triton_utils/fused_moe_triton_config.py
    ``get_config_file_name``, ``get_moe_configs``, ``try_get_optimal_moe_config``). So both
    files have the same keys, and the same BLOCK_SIZE_M under each. The folder takes the
    place of SGLang's own, with all of its files.

    Args and errors are `vllm`'s.
    """
    device = _device_name(rows, device_name)
    # 3.6.0 of 3.6.0+rocm7.0: a folder whose name is not numbers fails every lookup.
    version = re.sub(r"\.?[^\d.].*", "", rows["triton"].iloc[0])
    folder = Path("configs") / f"triton_{version.replace('.', '_')}"
    files = []
    for stem, of_file in _by_shape(rows, device):
        up, down = File(folder / f"{stem}.json"), File(folder / f"{stem}_down.json")
        up_body, down_body = {}, {}
        for m, of_m in of_file.groupby("m"):
            first, second = (of_m[of_m["layer"] == layer] for layer in (1, 2))
            above = choose(first)
            below = choose(second[second["block_m"].isin(above["block_m"])])
            if not (_serves(above, first) and _serves(below, second)):
                for file in (up, down):
                    file.left_out[str(m)] = "no block_m is known to fit both layers"
                continue
            up_body[str(m)], down_body[str(m)] = _entry(above), _entry(below)
            up.entries[str(m)], down.entries[str(m)] = _origin(above), _origin(below)
        files += [_filled(up, _json(up_body)), _filled(down, _json(down_body))]
    return files


def aiter(rows: pd.DataFrame) -> list[File]:
    """Spell choices as aiter reads them below ``AITER_TRITON_CONFIGS_PATH``.

    That is ``aiter/ops/triton/configs``, in later versions wherever the environment says.
    A file takes the place of aiter's own, with every entry that it had.

    - a8w4: ``moe/{arch}-A8W4.json``, a launch's ``bm{block_m}_n{N}_k{K}``, looked up
      exactly, N with gate and up (00c98a0544, moe_op_gemm_a8w4.py
      ``get_kernel_config_triton``).
    - a8w8, a4w4: ``moe/{arch}-MOE-FP8_W8A8.json`` and ``-MOE-MX_FP4.json``, of its fused
      MoE, whatever the shape: ``small_M`` below 256 tokens, ``medium_M`` below 1024,
      ``large_M``. One that is missing is a KeyError, so all three or no file
      (2038b2df47, moe_config_utils.py ``get_optimal_moe_config``). A file has no place for
      the kind of fp8 scales: it is made of a8w8.
    - a4w4, a8w8, a8w8_blockscale: its grouped GEMMs choose in code
      (``get_kernel_config``), so ``moe/{arch}-{name}.md`` is a table for who edits it.

    Args:
        rows: as `select` leaves them.
    Raises:
        ExportError: the target isn't one that aiter has such kernels for, or nothing fits.
    """
    target = targets.get(rows["target"].iloc[0])
    if target.backend != "hip":
        raise ExportError(f"aiter runs on AMD; {target.name} is none: give vllm or sglang")
    files = []
    for kernel, of_kernel in rows.groupby("kernel"):
        name = _AITER_NAMES[kernel]
        if target.name == "gfx1250" and name in ("A8W4", "A4W4"):
            raise ExportError(
                f"aiter's {name} on gfx1250 is a Gluon kernel, whose table has other keys: "
                "give another --kernel or --target"
            )
        files.append(_aiter_launches(of_kernel, target.name, name))
        if kernel in _AITER_FUSED:
            buckets = _aiter_buckets(of_kernel, target.name, _AITER_FUSED[kernel])
            if missing := ", ".join(buckets.left_out):
                files[-1].left_out[buckets.path.name] = f"no fit, or no rows, for {missing}"
            else:
                files.append(buckets)
    return files


def _aiter_launches(rows: pd.DataFrame, arch: str, name: str) -> File:
    """Choose for each launch that aiter tells apart: for its loader, or for a reader."""
    loaded = name == "A8W4"
    file = File(Path("moe") / f"{arch}-{name}{'.json' if loaded else '.md'}")
    body = {}
    for (block_m, n, k), of_launch in rows.groupby(["block_m", "n", "k"]):
        key = f"bm{block_m}_n{n}_k{k}"
        chosen = choose(of_launch)
        if chosen.empty:
            file.left_out[key] = "no configuration fits"
            continue
        file.entries[key] = _origin(chosen)
        entry = _entry(chosen)
        # These two are not the table's: the routing gives one, the launcher the other.
        del entry["BLOCK_SIZE_M"], entry["GROUP_SIZE_M"]
        body[key] = entry if loaded else {"block_m": block_m, "N": n, "K": k, **entry}
    return _filled(file, _json(body) if loaded else _table(body.values()))


def _aiter_buckets(rows: pd.DataFrame, arch: str, name: str) -> File:
    file = File(Path("moe") / f"{arch}-MOE-{name}.json")
    body = {}
    for bucket, (least, below) in _AITER_BUCKETS.items():
        chosen = choose(rows[(rows["m"] >= least) & (rows["m"] < below)])
        if chosen.empty:
            file.left_out[bucket] = "no configuration fits"
            continue
        file.entries[bucket] = _origin(chosen)
        body[bucket] = _entry(chosen)
    file.text = _json(body)
    return file


def _table(lines: Collection[dict[str, int]]) -> str:
    """Spell lines that have the same columns in Markdown."""
    columns = list(next(iter(lines), {}))
    cells = [columns, ["---:"] * len(columns), *(map(str, line.values()) for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _json(body: dict[str, Any]) -> str:
    return json.dumps(body, indent=4, default=int) + "\n"


def _by_shape(rows: pd.DataFrame, device: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Give each name that vLLM and SGLang would ask for, without its ending, and its rows."""
    # Layer 1 ends in gate and up, layer 2 reduces over what SwiGLU makes of them.
    width = rows["k"].where(rows["layer"] == 2, rows["n"] // 2).rename("width")
    for (kernel, experts, n), of_shape in rows.groupby(["kernel", "experts", width]):
        dtype, block_shape = _FP8_NAMES[kernel]
        blocks = f",block_shape={block_shape}" if block_shape else ""
        yield f"E={experts},N={n},device_name={device},dtype={dtype}{blocks}", of_shape


def _device_name(rows: pd.DataFrame, given: str | None) -> str:
    target = rows["target"].iloc[0]
    if not given and target not in DEVICE_NAMES:
        raise ExportError(
            f"no device name is known for {target}; give --device-name, which is what "
            "torch.cuda.get_device_name() says there"
        )
    return re.sub(r"[\s/]+", "_", given or DEVICE_NAMES[target])


def _entry(chosen: pd.DataFrame) -> dict[str, int]:
    """Spell a choice as all three engines do: constants and options of a launch."""
    row = chosen.iloc[0]
    return {
        "BLOCK_SIZE_M": int(row["block_m"]),
        "BLOCK_SIZE_N": int(row["block_n"]),
        "BLOCK_SIZE_K": int(row["block_k"]),
        "GROUP_SIZE_M": Tile.group_m,
        "num_warps": int(row["num_warps"]),
        "num_stages": int(row["num_stages"]),
        **launch_options(row["kernel"], targets.get(row["target"])),
    }


def launch_options(kernel: str, target: Target) -> dict[str, int]:
    """Give the options that a kernel's rows were compiled with; CUDA has no such ones."""
    if target.backend != "hip":
        return {}
    # As aiter launches its blockscale GEMM, and moelab its own.
    return AMD_OPTIONS | ({"waves_per_eu": 1} if kernel == "moe_gemm_a8w8_blockscale" else {})


def _origin(chosen: pd.DataFrame) -> dict[str, Any]:
    """Say which problems an entry was compiled for, and what the most LDS of them is."""
    compiled = {
        f"{column}s" if column in ("model", "layer") else column: sorted(chosen[column].unique())
        for column in _PROBLEM
    }
    return {
        "kernel": chosen["kernel"].iloc[0],
        **compiled,
        "lds_bytes": chosen["lds_bytes"].max(),
    }


def _filled(file: File, text: str) -> File:
    if not file.entries:
        raise ExportError(
            f"nothing to put in {file.path.name}: {next(iter(file.left_out.values()))}; "
            "sweep with --layer all, and with a tile and stages that fit"
        )
    file.text = text
    return file


def write(
    files: list[File], rows: pd.DataFrame, out: Path | str, *, source: str, force: bool = False
) -> list[Path]:
    """Write files with the provenance of each, every one whole or not at all.

    Args:
        files: of `vllm`, `sglang` or `aiter`.
        rows: that they were made of.
        out: folder; made if missing.
        source: where the rows were read.
        force: replace files that differ.
    Returns:
        the engine's files, provenance not counted.
    Raises:
        ExportError: a file is there and differs; nothing is written then.
        DiskFullError: there is no room; what was there before stays.
    """
    first = rows.iloc[0]
    texts: dict[Path, str] = {}
    for file in files:
        path = Path(out) / file.path
        provenance = {
            "moelab": __version__,
            "date": datetime.date.today().isoformat(),
            "rows": source,
            "rule": RULE,
            "caution": CAUTION,
            "target": first["target"],
            "triton": first["triton"],
            "async_copy": _listed(rows["async_copy"]),
            "lds_limit_bytes": first["lds_limit"],
            "entries": file.entries,
            "left_out": file.left_out,
        }
        texts[path] = file.text
        texts[path.with_suffix(".provenance.json")] = _json(provenance)
    different = [path for path, text in texts.items() if _differs(path, text)]
    if different and not force:
        names = "\n  ".join(map(str, different))
        raise ExportError(
            f"there, and different:\n  {names}\ngive --force to replace, or another --out"
        )
    for path, text in texts.items():
        disk.make_folder(path.parent)
        disk.replace(path, text)
    return [Path(out) / file.path for file in files]


def _differs(path: Path, text: str) -> bool:
    """Tell whether a file is there and says another thing, on whatever day."""
    date = r'"date": "[\d-]+"'
    return path.exists() and re.sub(date, "", path.read_text()) != re.sub(date, "", text)

"""How far do two measurements of the same build agree on the GPU at hand?

Measures a grid twice, each time in a process of its own that compiles, draws and settles
anew, and sets the times side by side. Takes what `moelab measure` takes, but for --export
and --store; add --keep FOLDER for the rows. Exits 1 where a time differs by 2% or more and
neither run marked it noisy.

    python benchmarks/same_build.py --kernel moe_gemm_a8w8 --tile 64x128x128 --warps 4 --m all
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from moelab import measurements, records

SHOWN = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--keep", type=Path, help="folder for the two runs' rows")
    given, grid = parser.parse_known_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            path = (given.keep or Path(folder)) / f"{name}.parquet"
            code = "import sys; from moelab.cli import app; app(sys.argv[1:])"
            where = ["--store", f"{folder}/{name}", "--export", str(path)]
            command = [sys.executable, "-c", code, "measure", *grid, *where]
            if failed := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                return failed
            runs.append(records.read(path))
    compared = measurements.compare(*runs)
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(compared.head(SHOWN).round(2).to_string(index=False))
    if len(compared) > SHOWN:
        print(f"... and {len(compared) - SHOWN} that differ less")
    for rows in runs:
        print(measurements.tally(rows))
    print(measurements.agreement(compared))
    unmarked = compared[~compared["noisy"]]
    apart = unmarked[measurements.DIFFERENCE].abs() >= 100 * measurements.AGREEMENT
    return int(apart.any() or compared.empty)


if __name__ == "__main__":
    sys.exit(main())

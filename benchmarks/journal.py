"""What it costs that a row survives: appended rows a second, as it is and without.

Without the wait for the disk a power cut takes the rows of the last seconds; without the
checksum a flipped bit is another figure. Both compare with what a compile takes: a sweep
appends as often as a compile ends, on each core.

    .venv/bin/python benchmarks/journal.py --folder rows
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from moelab import records, standings


def appended(folder, rows, sync=os.fdatasync, checksum=records.zlib.crc32):
    """Give rows a second, each appended by itself."""
    kept = os.fdatasync, records.zlib.crc32
    os.fdatasync, records.zlib.crc32 = sync, checksum
    try:
        with tempfile.TemporaryDirectory(dir=folder) as store:
            began = time.perf_counter()
            with records.Journal(Path(store)) as journal:
                for row in rows:
                    journal.append(row)
            return len(rows) / (time.perf_counter() - began)
    finally:
        os.fdatasync, records.zlib.crc32 = kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", default=".", help="On the disk that is asked about.")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    shipped = records.read(standings.SHIPPED)
    rows = shipped.astype(object).where(shipped.notna(), None).to_dict("records")
    rows = (rows * (given.rows // len(rows) + 1))[: given.rows]
    ways = {
        "checksum, on the disk": {},
        "checksum alone": {"sync": lambda file: None},
        "neither": {"sync": lambda file: None, "checksum": lambda line: 0},
    }
    found = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, how in ways.items():
            found[name].append(appended(given.folder, rows, **how))
    plain = statistics.median(found["neither"])
    for name, speeds in found.items():
        speed = statistics.median(speeds)
        print(
            f"{name:<22} {speed:>8,.0f} rows/s ({min(speeds):,.0f} to {max(speeds):,.0f}), "
            f"{speed / plain:.3f} of neither"
        )


if __name__ == "__main__":
    main()

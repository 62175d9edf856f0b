"""What the benchmarks that need a GPU ask first."""

import sys

from moelab import bench


def target() -> str:
    """Name the target of the GPU at hand; without one say so and end with exit code 1."""
    try:
        return bench.gpu().target.name
    except bench.MeasureError as error:
        sys.exit(str(error))

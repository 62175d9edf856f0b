"""Is the probe's LDS what the full compile reports, and how much sooner is it there?

Both answer every configuration of a mixed grid, one after the other in this process,
in random order and with cold caches. Exits 1 if any byte count differs, or if one rejects
what the other compiles.
"""

import argparse
import itertools
import random
import sys
import time
import warnings
from collections.abc import Callable

import triton
from triton.compiler.errors import TritonError

from moelab import compiler, plan, problems
from moelab.kernels import KERNELS
from moelab.parameters import as_list
from moelab.specs import Configuration
from moelab.targets import TARGETS, get

# The published rules' tiles and warps for the smallest, a middle and the largest block_m,
# on the targets that they were made for; on Hopper, where those spill, such as its kernels
# use; small ones elsewhere, where fp8 is emulated in a lot of code.
RULED_BLOCK_M = (16, 32, 128)
RULED_DENSE_M = (4, 64, 8192)
HOPPER_TILES = (("16x128x128", 4), ("64x128x128", 4), ("128x256x128", 8))
SMALL_TILES = (("16x64x64", 4), ("32x64x128", 4), ("64x64x64", 8))


def tilings(kernel: str, target: str) -> list[dict[str, object]]:
    """Choose three tiles, given or by what the rules have for a number of tokens."""
    if target not in ("gfx942", "gfx950"):
        tiles = HOPPER_TILES if target == "sm_90" else SMALL_TILES
        return [{"tiles": tile, "warps": warps} for tile, warps in tiles]
    if kernel in problems.DENSE:
        return [{"m": m} for m in RULED_DENSE_M]
    model = next(model for model in problems.MODELS.values() if kernel in model.kernels)
    return [{"m": block_m * model.experts // model.top_k} for block_m in RULED_BLOCK_M]


def configurations(
    targets: list[str], stages: list[int], async_copy: str = "default"
) -> list[Configuration]:
    """Every kernel, tile and stage count of each target; layers in turn."""
    found = []
    for kernel, target in itertools.product(KERNELS, targets):
        layers = (1, 1) if kernel in problems.DENSE else (1, 2)
        for layer, tiling in zip(itertools.cycle(layers), tilings(kernel, target)):
            found += plan.grid(
                kernels=kernel,
                targets=target,
                layers=layer,
                stages=stages,
                async_copy=async_copy,
                **tiling,
            )
    return found


def probe_lds(launch: compiler.Launch) -> int | None:
    """Ask as moelab does; None where the compiler rejects the kernel."""
    try:
        return compiler.lds(launch).lds_bytes
    except compiler.CompileError:
        return None


def compile_lds(launch: compiler.Launch) -> int | None:
    """Do what a user without moelab would do, in a cache of its own."""
    try:
        with compiler.settings(launch):
            compiled = triton.compile(
                launch.ast, target=compiler.gpu_target(launch.target), options=dict(launch.options)
            )
    except (TritonError, RuntimeError):
        return None
    return compiled.metadata.shared


def timed(ask: Callable[[compiler.Launch], int | None], launch: compiler.Launch):
    start = time.perf_counter()
    answer = ask(launch)
    return time.perf_counter() - start, answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default="gfx950,gfx942,sm_90")
    parser.add_argument("--stages", default="1,2,3,4")
    parser.add_argument("--async-copy", choices=plan.ASYNC_COPY, default="default")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    targets = list(TARGETS) if given.targets == "all" else as_list(given.targets)
    grid = configurations(targets, as_list(given.stages, int), given.async_copy)
    random.Random(given.seed).shuffle(grid)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    asks = {"probe": probe_lds, "compile": compile_lds}
    for ask in asks.values():
        # The first compile for a backend loads what all others share.
        for target in ("gfx950", "sm_90"):
            ask(compiler.specialize(configurations([target], [1])[0]))
    seconds = dict.fromkeys(asks, 0.0)
    different, rejected = [], 0
    for index, configuration in enumerate(grid):
        launch = compiler.specialize(configuration)
        answers = {}
        for name in sorted(asks, reverse=index % 2 == 0):
            spent, answers[name] = timed(asks[name], launch)
            seconds[name] += spent
        rejected += answers["compile"] is None
        if answers["probe"] != answers["compile"]:
            different.append((configuration, answers))
        if sys.stderr.isatty():
            print(f"\r{index + 1} of {len(grid)}", end="", file=sys.stderr)
    for configuration, answers in different:
        print(f"DIFFERENT: {configuration}: {answers}")
    slow = [name for name in targets if not compiler.is_checked(get(name))]
    print(
        f"Triton {triton.__version__}, targets {given.targets}, stages {given.stages}, "
        f"async copy {given.async_copy}: {len(grid) - len(different)} of {len(grid)} answers "
        f"equal, {rejected} of them rejections; probe {seconds['probe']:.1f} s"
        + (f" (in full for {', '.join(slow)})" if slow else "")
        + f", triton.compile {seconds['compile']:.1f} s: "
        f"{seconds['compile'] / seconds['probe']:.1f} times faster"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

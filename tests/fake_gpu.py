"""A GPU that a worker finds where there is none: every launch takes the time it is told to.

`install` is called in the worker's process, which reads from ``$FAKE_GPU`` how the GPU is:

    name            of the GPU
    limit           the most stages that fit
    slower          [[column, value], factor], ...: launches with that take longer
    noise           of a turn, the deviation of its logarithm
    noisy           columns of launches that have 0.1 of it
    wrong, fails, loses, crashes, hangs   columns of launches that do
    crowded         columns of launches that lose the GPU beside others, and alone do not
    tires           columns of launches whose process dies once it took 12 turns
    log             a file: a line for each turn, with the process and the launch
"""

import itertools
import json
import os
import random
import time

from moelab import launcher, sensors, sweep, targets, timing, workers

_GIVEN = {"name": "a GPU", "limit": 3, "slower": [], "noise": 0.003, "log": os.devnull}
_turns = itertools.count()


def told():
    return _GIVEN | json.loads(os.environ.get("FAKE_GPU", "{}"))


def _has(of, columns):
    asked = of.asked()
    return columns is not None and all(asked[name] == value for name, value in columns.items())


class Turns:
    def __init__(self, launches, tell=lambda of: None):
        self._launches, self._tell = launches, tell
        self._gpu = told()

    def start(self, of):
        self._tell(of)
        asked = self._launches[of]
        if _has(asked, self._gpu.get("fails")):
            raise timing.LaunchFailed({"status": "launch_error", "reason": "invalid argument"})
        crowded = len(self._launches) > 1 and _has(asked, self._gpu.get("crowded"))
        if crowded or _has(asked, self._gpu.get("loses")):
            lost = {"status": "launch_error", "reason": "RuntimeError: illegal access"}
            raise timing.ContextLost(of, lost)

    def settle(self, of, alike, most):
        self._tell(of)
        if _has(self._launches[of], self._gpu.get("crashes")):
            os.abort()
        if _has(self._launches[of], self._gpu.get("hangs")):
            time.sleep(60)

    def sample(self, of, repetitions):
        self._tell(of)
        noise = 0.1 if _has(self._launches[of], self._gpu.get("noisy")) else self._gpu["noise"]
        turn = next(_turns)
        if turn >= 12 and _has(self._launches[of], self._gpu.get("tires")):
            os.abort()
        us = 100.0 * random.Random(f"{of}, {turn}").lognormvariate(0, noise)
        for (column, value), factor in self._gpu["slower"]:
            us *= factor if self._launches[of].asked()[column] == value else 1
        # What another source of the kernels plants.
        us *= getattr(launcher.kernels, "PLANTED", 1.0)
        with open(self._gpu["log"], "a") as log:
            launch = self._launches[of]
            key = of if isinstance(of, str) else launch.num_stages
            log.write(json.dumps([os.getpid(), key, launch.problem.m]) + "\n")
        return [round(us, 2)] * repetitions, sensors.Reading(1980.0, 50.0, frozenset())


def _compiled(rows, *_):
    limit = told()["limit"]
    return {
        row["compile_key"]: {
            "status": "ok" if of.num_stages <= limit else "out_of_lds",
            "reason": None,
            "lds_bytes": 100 * of.num_stages,
            "lds_limit": 100 * limit,
            "moelab": "0",
            "schema": 6,
        }
        for of, row in rows.items()
    }


def _checked(of_problem, lds, before, how):
    wrong = told().get("wrong")
    found = {of: {"largest_error": 0.0} for of in of_problem}
    for of in of_problem:
        if _has(of, wrong):
            found[of] |= {"status": "wrong_result", "reason": "off by 1"}
    drawn = type("Drawn", (), {"drawn_for": (of_problem[0].kernel, None)})()
    return drawn, {of: of for of in of_problem if "status" not in found[of]}, found


def _ask(configurations, *_, **__):
    import pandas as pd

    limit = told()["limit"]
    fits = ["ok" if of.num_stages <= limit else "out_of_lds" for of in configurations]
    return pd.DataFrame({"status": fits})


def install():
    launcher.gpu = lambda: launcher.Gpu(told()["name"], targets.get("sm_90"))
    launcher.measured_roofs = lambda rounds: launcher.Roofs({"fp8": 1000.0, "bf16": 500.0}, 3.0)
    sweep.compiled = _compiled
    launcher.checked = _checked
    sweep.run = _ask
    timing.Turns = Turns


def install_in_workers():
    """Let the workers that this process starts find a GPU, and compile nothing itself."""
    workers._CODE = "import sys, fake_gpu; fake_gpu.install(); " + workers._CODE
    sweep.compiled = _compiled


def chatter():
    """Print while a launch is prepared, as compilers do."""
    checked = launcher.checked

    def loud(*given):
        print("ptxas info", flush=True)
        os.system("echo a subprocess")
        return checked(*given)

    launcher.checked = loud

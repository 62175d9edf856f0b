"""A GPU that a worker finds where there is none: every launch takes the time it is told to.

`install` is called in the worker's process, which reads from ``$FAKE_GPU`` how the GPU is:

    limit           the most stages that fit
    slower          [[column, value], factor], ...: launches with that take longer
    noise           of a turn, the deviation of its logarithm
    noisy           columns of launches that have 0.1 of it
    wrong, fails, loses, crashes, hangs   columns of launches that do
    tires           columns of launches whose process dies once it took 12 turns
    log             a file: a line for each turn, with the process and the launch
"""

import itertools
import json
import os
import random
import time

from moelab import bench, sensors, sweep, targets, timing

_GIVEN = {"limit": 3, "slower": [], "noise": 0.003, "log": os.devnull}
_turns = itertools.count()


def told():
    return _GIVEN | json.loads(os.environ.get("FAKE_GPU", "{}"))


def _has(of, columns):
    asked = of.asked()
    return columns is not None and all(asked[name] == value for name, value in columns.items())


class Turns:
    def __init__(self, launches):
        self._launches = launches
        self._gpu = told()

    def start(self, of):
        asked = self._launches[of]
        if _has(asked, self._gpu.get("fails")):
            raise timing.LaunchFailed({"status": "launch_error", "reason": "invalid argument"})
        if _has(asked, self._gpu.get("loses")):
            lost = {"status": "launch_error", "reason": "RuntimeError: illegal access"}
            raise timing.ContextLost(of, lost)

    def settle(self, of, alike, most):
        if _has(self._launches[of], self._gpu.get("crashes")):
            os.abort()
        if _has(self._launches[of], self._gpu.get("hangs")):
            time.sleep(60)

    def sample(self, of, repetitions):
        noise = 0.1 if _has(self._launches[of], self._gpu.get("noisy")) else self._gpu["noise"]
        turn = next(_turns)
        if turn >= 12 and _has(self._launches[of], self._gpu.get("tires")):
            os.abort()
        us = 100.0 * random.Random(f"{of}, {turn}").lognormvariate(0, noise)
        for (column, value), factor in self._gpu["slower"]:
            us *= factor if self._launches[of].asked()[column] == value else 1
        # What another source of the kernels plants.
        us *= getattr(bench.kernels, "PLANTED", 1.0)
        with open(self._gpu["log"], "a") as log:
            log.write(json.dumps([os.getpid(), of, self._launches[of].problem.m]) + "\n")
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


def _checked(of_problem, rows, before, how):
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
    bench.gpu = lambda: bench.Gpu("a GPU", targets.get("sm_90"))
    bench._compiled = _compiled
    bench._checked = _checked
    sweep.run = _ask
    timing.Turns = Turns


def chatter():
    """Print while a launch is prepared, as compilers do."""
    checked = bench._checked

    def loud(*given):
        print("ptxas info", flush=True)
        os.system("echo a subprocess")
        return checked(*given)

    bench._checked = loud

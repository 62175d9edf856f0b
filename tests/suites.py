"""Simulated suites of benchmarks: noise of a known kind around a known truth.

A cell's two sides take turns in random order, round after round. Each turn has repetitions;
`paired_rounds.judge` sees what it would see of a GPU.
"""

from dataclasses import dataclass

import numpy as np
from scipy import signal

from moelab import paired_rounds


@dataclass(frozen=True)
class Noise:
    """Standard deviations and shares, of the logarithm of a time.

    Args:
        repetition: of one repetition; each keeps ``memory`` of the one before.
        turn: of a whole turn: what a process or a moment adds to all its repetitions.
        drift: of clocks and temperature, which keep ``lag`` from turn to turn of both sides.
        mode: by how much a turn in the second mode is slower; ``mode_share`` of turns are.
        outlier_share: of repetitions, slower by ``outlier`` on average.
    """

    repetition: float
    turn: float
    drift: float
    mode: float
    outlier: float
    memory: float = 0.3
    lag: float = 0.9
    mode_share: float = 0.1
    outlier_share: float = 0.03

    def times(self, rng, slowdown, rounds=paired_rounds.LOOKS[-1], repetitions=20):
        """Draw ``[cells, rounds, 2, repetitions]`` logarithms of times, the baseline first."""
        cells = len(slowdown)
        turns = (cells, rounds, 2)
        drift = _remembering(rng.normal(size=(cells, 2 * rounds)), self.lag).reshape(turns)
        # Either side may be first.
        swapped = rng.random((cells, rounds, 1)) < 0.5
        drift = np.where(swapped, drift[..., ::-1], drift)
        of_turn = (
            self.drift * drift
            + self.turn * rng.normal(size=turns)
            + self.mode * (rng.random(turns) < self.mode_share)
        )
        shape = (*turns, repetitions)
        taken = self.repetition * _remembering(rng.normal(size=shape), self.memory)
        taken += rng.exponential(self.outlier, shape) * (rng.random(shape) < self.outlier_share)
        taken += of_turn[..., None]
        taken[:, :, 1] += np.log1p(slowdown)[:, None, None]
        return taken

    def differences(self, rng, slowdown):
        """Draw each round's d_r: ``[cells, rounds]``."""
        medians = np.median(self.times(rng, slowdown), axis=-1)
        return medians[..., 1] - medians[..., 0]


MODERATE = Noise(repetition=0.01, turn=0.006, drift=0.008, mode=0.01, outlier=0.2)
NOISY = Noise(repetition=0.02, turn=0.012, drift=0.016, mode=0.02, outlier=0.4)


def _remembering(steps, memory):
    """Let each step keep some of the one before it, along the last axis; variance stays 1."""
    steps = steps * np.sqrt(1 - memory**2)
    steps[..., 0] /= np.sqrt(1 - memory**2)
    return signal.lfilter([1], [1, -memory], steps)


def judged(differences, threshold=paired_rounds.THRESHOLD):
    """Look after 6, 12 and 24 rounds; what is decided is measured no further."""
    looks = paired_rounds.LOOKS
    rounds = np.full(len(differences), looks[0])
    for look in looks:
        seen = np.where(np.arange(differences.shape[1]) < rounds[:, None], differences, np.nan)
        cells = paired_rounds.judge(seen, threshold=threshold)
        rounds = np.where((cells["answer"] == "inconclusive") & (rounds == look), 2 * look, rounds)
    return cells


def covered(cells, slowdown):
    """Which intervals hold the truth."""
    return (cells["ratio_low"] <= 1 + slowdown) & (1 + slowdown <= cells["ratio_high"])

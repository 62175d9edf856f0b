"""Questions are spread over whoever answers, and what is finished is told together."""

from concurrent.futures import Future

import pytest

from moelab import answers


class Compilers:
    """Three questions at a time.

    Args:
        finished: by question, what is finished, in order, as soon as that one is asked.
        failing: what can't be answered.
    """

    ahead = 3

    def __init__(self, finished, failing=()):
        self._finished, self._failing = finished, failing
        self.asked = {}

    def ask(self, question):
        self.asked[question] = Future()
        for done in self._finished.get(question, ()):
            self.asked[done].set_result(done)
        return self.asked[question]

    def answer(self, done, question):
        if question in self._failing:
            raise OSError("no room")
        return {"of": done.result()}


def test_what_is_finished_is_told_together():
    compilers = Compilers({2: [0], 3: [2, 1], 4: [3, 4]})
    found = list(answers.spread({str(number): number for number in range(5)}, compilers))
    assert [list(some) for some in found] == [["0"], ["2", "1"], ["3", "4"]]
    assert all(some[key] == {"of": int(key)} for some in found for key in some)


def test_no_more_is_asked_ahead_than_is_wanted():
    compilers = Compilers({2: [0], 3: [2, 1], 4: [3, 4]})
    found = answers.spread(dict(zip("abcde", range(5), strict=True)), compilers)
    next(found)
    assert list(compilers.asked) == [0, 1, 2]
    next(found)
    assert list(compilers.asked) == [0, 1, 2, 3]


def test_what_was_finished_before_an_error_is_told_first():
    found = answers.spread({"a": 0, "b": 1, "c": 2}, Compilers({2: [1, 0, 2]}, failing=[2]))
    assert next(found) == {"b": {"of": 1}, "a": {"of": 0}}
    with pytest.raises(OSError, match="no room"):
        next(found)

"""A sweep over a dask cluster: the rows of one machine, whatever becomes of the others."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import faults
import pytest
from clusters import Cluster, listening
from faults import ABORT, HANG, KILLER, SEGFAULT, STUMBLE, Sweep
from pandas.testing import assert_frame_equal

from moelab import answers, cluster, records, sweep, targets

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")

HERE = Path(__file__).parent

# 127.0.0.1, as /proc/net/tcp writes it.
LOOPBACK_IN_HEX = "0100007F"


@pytest.fixture(autouse=True)
def pretending(monkeypatch):
    """Let sweeps of this process answer as `faults` does."""
    monkeypatch.setattr(sweep, "settled", lambda question: question)
    monkeypatch.setattr(sweep, "asked_row", faults.asked_row)
    monkeypatch.setattr(answers, "_compile_one", faults.answer)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A cluster of two workers."""
    with Cluster(tmp_path_factory.mktemp("two"), 2) as started:
        yield started
    assert faults.outlived(started.folder) == {}


def run(stages, store, address, **options):
    return sweep.run(faults.questions(stages), store, dask=address, progress=False, **options)


def wait_until(true, within_s=10):
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.02)


def kept(store):
    """The stage counts that a store's lines have, sorted: a row done twice is there twice."""
    return sorted(line.row["num_stages"] for line in records.lines(store) if line.row)


def test_a_cluster_gives_the_frame_that_one_machine_gives_and_nothing_is_asked_twice(two, tmp_path):
    stages = [*range(1, 30), ABORT, SEGFAULT, STUMBLE, HANG]
    given = {"timeout_s": 1, "memory": 1 << 30}
    here = sweep.run(faults.questions(stages), tmp_path / "here", progress=False, **given)
    assert_frame_equal(run(stages, tmp_path / "there", two.address, **given), here)
    assert sorted(of for of, _ in two.runs()) == sorted(stages)
    assert len({by for _, by in two.runs()}) == 2
    (hang,) = here.loc[here["num_stages"] == HANG, "reason"]
    assert hang == "not finished after 1 s"
    # Of what is known a cluster is not asked.
    assert_frame_equal(run(stages[:29], tmp_path / "here", "tcp://127.0.0.1:1"), here[:29])


def test_processes_of_a_worker_stay_for_the_next_sweep(two, tmp_path):
    given = {"timeout_s": 1, "memory": 1 << 30}
    run([1, 2], tmp_path / "first", two.address, **given)
    before = set(faults.alive(two.folder))
    run([1, 2], tmp_path / "second", two.address, **given)
    assert set(faults.alive(two.folder)) == before


def test_a_scheduler_keeps_nothing_of_a_sweep(two, tmp_path):
    run(range(1, 9), tmp_path, two.address)
    with cluster.connected(two.address) as client:
        assert client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) == 0


@pytest.mark.parametrize("tasks", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_worker_costs_only_what_it_was_doing(tmp_path, tasks):
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", 2, MOELAB_TESTS_SLEEP="0.05") as of:
        asked = threading.Thread(target=run, args=[range(1, tasks + 1), tmp_path, of.address])
        asked.start()
        wait_until(lambda: len(of.runs()) > tasks / 2)
        os.kill(of.runs()[-1][1], signal.SIGKILL)
        asked.join()
        assert kept(tmp_path) == list(range(1, tasks + 1))
        assert set(records.read(tmp_path)["status"]) == {"ok"}
        assert len(of.runs()) - tasks in (0, 1)


def test_who_kills_dask_workers_is_named_and_nobody_else(two, tmp_path):
    rows = run([1, 2, KILLER, 3, 4], tmp_path, two.address).set_index("num_stages")
    assert rows["status"].to_dict() == dict.fromkeys([1, 2, 3, 4], "ok") | {KILLER: "crashed"}
    assert rows["reason"][KILLER].startswith("2 dask workers died while they had this, and 2 more")


def test_a_lost_scheduler_has_its_own_exit_code_and_the_same_command_goes_on(two, tmp_path):
    folder, store = tmp_path / "cluster", tmp_path / "rows"
    folder.mkdir()
    with Cluster(folder, MOELAB_TESTS_SLEEP="0.02") as of:
        process = Sweep(store, range(1, 200), dask=of.address, jobs=None)
        process.wait_for_a_row()
        of.scheduler.kill()
        began = time.monotonic()
        code, err, told = process.end()
        assert time.monotonic() - began < 5
    assert code == 5, err
    said = re.search(
        r"^(\d+) of 199 rows are in (.*); .* asks only for the other (\d+)$", err, re.M
    )
    assert said[2] == str(store)
    assert int(said[1]) == len(told) == len(kept(store)) and int(said[1]) + int(said[3]) == 199
    assert err.startswith("Error: the scheduler is lost")
    # Workers end with their scheduler, and processes with their worker.
    assert faults.outlived(folder) == {}
    run(range(1, 200), store, two.address)
    assert kept(store) == list(range(1, 200))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_who_asks_may_be_interrupted_or_killed_and_leaves_no_task(two, tmp_path, how):
    begun = [of for of, _ in two.runs()].count(HANG)
    process = Sweep(tmp_path, [1, HANG, 2, 3, 4], dask=two.address, jobs=None)
    wait_until(lambda: [of for of, _ in two.runs()].count(HANG) > begun)
    began = time.monotonic()
    process.process.send_signal(how)
    code, err, _ = process.end()
    assert time.monotonic() - began < 2
    assert faults.outlived(tmp_path) == {}
    if how == signal.SIGINT:
        assert code == 130
        assert re.search(r"interrupted; \d of 5 rows .* asks only for the other \d", err), err
    began = time.monotonic()
    run([5, 6], tmp_path, two.address)
    assert time.monotonic() - began < 5


# A cluster of our own.


@pytest.fixture
def pretended_workers(tmp_path, monkeypatch):
    """Let workers of ``local`` answer as `faults` does, and be found."""
    script = tmp_path / "preload.py"
    script.write_text("import faults; faults.pretend()")
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", str(script))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, sys.path)]))
    monkeypatch.setenv(faults.MARK, str(tmp_path))
    return tmp_path


def test_a_local_cluster_gives_the_same_rows_and_ends_with_its_sweep(pretended_workers):
    here = sweep.run(faults.questions([1, 2, ABORT]), pretended_workers / "here", progress=False)
    there = run([1, 2, ABORT], pretended_workers / "there", "local", jobs=2)
    assert_frame_equal(there, here)
    left = faults.outlived(pretended_workers).values()
    # This process, and what it tracks its own processes' resources with.
    assert [command for command in left if "dask" in str(command) or "spawn" in str(command)] == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_only_this_machine_reaches_a_local_cluster_and_none_of_it_outlives_its_sweep(
    pretended_workers, how
):
    process = Sweep(pretended_workers, [1, HANG], dask="local", jobs=2)
    process.wait_for_a_row()
    started = faults.alive(pretended_workers).keys() - {os.getpid()}
    # The sweep, a scheduler, a worker, and its processes.
    assert len(started) >= 4
    assert listening(started) == {LOOPBACK_IN_HEX}
    process.process.send_signal(how)
    process.end()
    assert faults.outlived(pretended_workers).keys() - {os.getpid()} == set()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_cluster_with_certificates_answers_who_has_one_and_nobody_else(tmp_path):
    folder = tmp_path / "cluster"
    folder.mkdir()
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=moelab -keyout {key}"
    subprocess.run([*command.split(), "-out", cert], check=True, capture_output=True)
    options = ["--protocol", "tls", "--tls-ca-file", cert, "--tls-cert", cert, "--tls-key", key]
    with Cluster(folder, 1, options=options) as of:
        assert of.address.startswith("tls://127.0.0.1:")
        with pytest.raises(cluster.ClusterError, match=r"no certificate: set distributed\.comm"):
            run([1], tmp_path / "rows", of.address)
        tls = {"ca-file": cert, "client.cert": cert, "client.key": key}
        with dask.config.set({f"distributed.comm.tls.{of}": str(at) for of, at in tls.items()}):
            rows = run([1, 2], tmp_path / "rows", of.address)
    assert list(rows["status"]) == ["ok", "ok"]


# Who may answer.

OTHER = "import faults; faults.pretend(); from moelab import cluster; cluster._moelab = lambda: '0'"


@pytest.mark.slow
def test_a_worker_of_another_moelab_is_left_out_if_it_comes_later_and_refused_if_it_is_there(
    tmp_path, capfd
):
    folder, store = tmp_path / "cluster", tmp_path / "rows"
    folder.mkdir()
    with Cluster(folder, MOELAB_TESTS_SLEEP="0.05") as of:
        asked = threading.Thread(target=run, args=[range(1, 80), store, of.address])
        asked.start()
        wait_until(lambda: of.runs())
        of.start_worker(preload=OTHER)
        asked.join()
        assert kept(store) == list(range(1, 80))
        assert len({by for _, by in of.runs()}) == 1
        said = capfd.readouterr().err
        assert re.search(
            r"tcp://\S+: moelab is 0 there, 0\.1\.0, sources \w{12} here: install", said
        )
        assert said.count("Nothing more is asked of this worker") == 1
        with pytest.raises(
            cluster.ClusterError, match=r"moelab is 0 there, 0\.1\.0, sources"
        ) as error:
            run([1, 100], store, of.address)
        assert str(error.value).startswith("nothing was asked")
        assert "1 of 2 rows are in" in str(error.value)
        assert 100 not in {of for of, _ in of.runs()}


def test_a_file_with_kernels_must_be_the_same_everywhere(two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("x = 1")
    missing = pytest.raises(cluster.ClusterError, match=r"mine.py is missing there, \w{12} here")
    with missing, cluster.connected(two.address, files=["mine.py"]):
        pass


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1], "expected columns and values, not list"),
        ({"status": None}, "status '-' of schema 6; expected schema 6 and one of ok, "),
        ({"kernel": "another"}, "no answer has a column 'kernel'"),
        ({"size": 1}, "no row has a column 'size'"),
        ({"lds_bytes": "1024"}, "lds_bytes is '1024', not of type Int64"),
        ({"lds_bytes": True}, "lds_bytes is 'True', not of type Int64"),
        ({"reason": "x" * (5 << 20)}, "bytes; they have up to 4,194,304"),
    ],
)
def test_what_a_worker_answers_is_held_to_what_rows_have(answer, words):
    right = answers.stamped("ok", None, targets.get("gfx950")) | {"lds_bytes": 1024}
    records.check_answer(right)
    with pytest.raises(ValueError, match=re.escape(words)):
        records.check_answer(right | answer if isinstance(answer, dict) else answer)


# Addresses.


@pytest.mark.parametrize("address", ["10.0.0.1:8786", "tcp://10.0.0.1", "http://x:1", "", "here"])
def test_what_is_no_address_is_wrong_use(tmp_path, address):
    with pytest.raises(ValueError, match="is no scheduler's address: give tcp://HOST:PORT or"):
        run([1], tmp_path, address)


def test_a_cluster_decides_how_much_is_done_at_once_and_with_which_triton(tmp_path):
    with pytest.raises(ValueError, match=r"jobs = 2 beside the cluster \S+: leave it"):
        run([1], tmp_path, "tcp://127.0.0.1:1", jobs=2)
    with pytest.raises(ValueError, match="workers answer with the Triton that they were started"):
        run([1], tmp_path, "tcp://127.0.0.1:1", triton=sys.executable)


def test_an_address_where_nobody_listens_is_told_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.5)
    with pytest.raises(cluster.ClusterError, match=r"no scheduler at \S+:1 "):
        run([1], tmp_path, "tcp://127.0.0.1:1")


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(cluster.ClusterError, match=re.escape("pip install 'moelab[dask]'")):
        run([1], tmp_path, "tcp://127.0.0.1:1")

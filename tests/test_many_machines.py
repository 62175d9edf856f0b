"""What docs/many_machines.md has its reader type is understood by dask, Slurm and Kubernetes."""

import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from moelab.cli import app

pytest.importorskip("distributed")

DOCUMENT = (Path(__file__).parents[1] / "docs" / "many_machines.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def options(command):
    """The options that one of dask's commands knows."""
    from distributed.cli import dask_scheduler, dask_worker

    main = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[command]
    known = CliRunner().invoke(main, ["--help"])
    assert known.exit_code == 0, known.output
    return set(re.findall(r"--[a-z-]+", known.output))


def commands(text):
    """The shell commands of a block, each as a list of words without its environment."""
    for line in text.replace("\\\n", " ").splitlines():
        words = [
            word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)
        ]
        if words and words[0] != "export":
            yield words


@pytest.mark.parametrize(
    "words", [words for block in blocks("sh") for words in commands(block)], ids=" ".join
)
def test_a_command_has_only_options_that_there_are(words):
    given = {word for word in words if word.startswith("--")}
    if words[0] == "dask":
        assert given <= options(words[1])
    elif words[0].endswith("moelab"):
        known = CliRunner().invoke(app, [words[1], "--help"]).output
        assert given <= set(re.findall(r"--[a-z-]+", known))
    else:
        assert words[0] == "openssl"


def test_slurm_is_asked_for_a_gpu_and_its_worker_offers_it(tmp_path, monkeypatch):
    jobqueue = pytest.importorskip("dask_jobqueue")
    monkeypatch.chdir(tmp_path)
    make = next(words for block in blocks("sh") for words in commands(block) if "openssl" in words)
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    subprocess.run(make, check=True, capture_output=True)
    seen = []
    monkeypatch.setattr(jobqueue.SLURMCluster, "scale", lambda self, jobs: seen.append(self))
    monkeypatch.setattr(signal, "pause", lambda: None)
    (script,) = blocks("python")
    exec(compile(script, "slurm.py", "exec"), {})
    (cluster,) = seen
    with cluster:
        assert cluster.scheduler_address.startswith("tls://")
        lines = cluster.job_script().splitlines()
    assert {"#SBATCH --gres=gpu:1", "#SBATCH -t 04:00:00", "#SBATCH --cpus-per-task=8"} <= {*lines}
    (worker,) = (shlex.split(line) for line in lines if "dask_worker" in line)
    given = {word for word in worker if word.startswith("--")}
    assert given <= options("worker")
    assert worker[worker.index("--resources") + 1] == "GPU=1"
    assert worker[worker.index("--tls-cert") + 1] == str(tmp_path / "cert.pem")
    assert worker[worker.index("--nthreads") + 1] == "8"


def test_kubernetes_gives_each_worker_the_gpu_that_it_offers():
    (text,) = blocks("yaml")
    service, scheduler, worker = yaml.safe_load_all(text)
    assert service["spec"]["selector"] == scheduler["spec"]["selector"]["matchLabels"]
    for of, name in ((scheduler, "scheduler"), (worker, "worker")):
        template = of["spec"]["template"]
        assert template["metadata"]["labels"] == of["spec"]["selector"]["matchLabels"]
        (container,) = template["spec"]["containers"]
        command = container["command"]
        assert command[:2] == ["dask", name]
        assert {word for word in command if word.startswith("--")} <= options(name)
        assert all(isinstance(word, str) for word in command)
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
    assert (
        command[2] == f"tls://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )
    assert command[command.index("--resources") + 1] == "GPU=1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1

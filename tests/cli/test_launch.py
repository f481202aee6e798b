"""`weft launch`: job files for clusters. Slurm's script is run, with programs of the test's in the place of Slurm's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.multi import spawn
from weft.cli.launch import KINDS
from weft.cli.main import main
from weft.run.config import load_config
from weft.run.listeners import read_events
from weft.run.start import train_run


def written(run_yaml: Path, kind: str, *options: str) -> str:
    """The job file of a kind."""
    out = run_yaml.with_name(f"job.{kind}")
    assert main(["launch", str(run_yaml), f"--{kind}", "--out", str(out), *options]) == 0
    return out.read_text()


def options_of(script: str) -> dict[str, str]:
    """Slurm's options in a batch script."""
    lines = [line.partition("#SBATCH --")[2].split("  #")[0] for line in script.splitlines()]
    return {name.strip(): value.strip() for line in lines if line for name, _, value in [line.partition("=")]}


# ---- What the files say --------------------------------------------------------------------------------------------


def test_slurm_starts_one_task_on_each_host_and_queues_again_after_a_preemption(run_yaml):
    script = written(run_yaml, "slurm", "--nodes", "4", "--gpus", "8", "--time", "30.5", "--partition", "a100")
    found = options_of(script)
    assert {name: found[name] for name in ("nodes", "ntasks-per-node", "gpus-per-node", "partition", "time")} == {
        "nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "8", "partition": "a100", "time": "1-06:30:00",
    }  # fmt: skip
    assert found["signal"] == "B:TERM@120" and "requeue" in found and found["open-mode"] == "append"
    assert f'weft train --gpus 8 --nodes 4 --rendezvous "$FIRST:$PORT" {run_yaml}' in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_skypilot_gets_a_managed_job_on_spot_machines_whose_stop_is_no_end(run_yaml):
    task = yaml.safe_load(written(run_yaml, "skypilot", "--nodes", "2", "--accelerator", "A100"))
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "A100:8"
    assert task["resources"]["use_spot"] and task["resources"]["job_recovery"]["recover_on_exit_codes"] == [130, 143]
    assert '--node-rank "$SKYPILOT_NODE_RANK"' in task["run"] and task["run"].endswith("output=/runs\n")
    assert task["file_mounts"]["/runs"]["mode"] == "MOUNT"
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [role["template"]["spec"]["containers"][0] for role in job["spec"]["pytorchReplicaSpecs"].values()]


def test_kubeflow_v1_gets_a_master_and_workers_whose_containers_are_called_pytorch(run_yaml):
    job = yaml.safe_load(written(run_yaml, "k8s-v1", "--nodes", "3", "--gpus", "4", "--image", "me/weft:1"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = {name: role["replicas"] for name, role in job["spec"]["pytorchReplicaSpecs"].items()}
    assert replicas == {"Master": 1, "Worker": 2}
    for container in containers(job):
        assert container["name"] == "pytorch" and container["image"] == "me/weft:1"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
        assert (
            'exec env -u RANK -u WORLD_SIZE weft train --gpus 4 --nodes 3 --node-rank "$RANK"' in container["args"][0]
        )


def test_kubeflow_v2_gets_a_train_job_of_the_torch_runtime(run_yaml):
    job = yaml.safe_load(written(run_yaml, "k8s", "--nodes", "2"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed" and job["spec"]["trainer"]["numNodes"] == 2
    assert '--rendezvous "$PET_MASTER_ADDR:29500"' in job["spec"]["trainer"]["args"][0]
    assert job["spec"]["podTemplateOverrides"][0]["targetJobs"] == [{"name": "node"}]


@pytest.mark.parametrize("kind", KINDS)
def test_one_host_meets_nobody_and_the_way_to_submit_is_told(run_yaml, capsys, kind):
    assert "--rendezvous" not in written(run_yaml, kind)
    assert f"Submit it: {KINDS[kind].submit} " in capsys.readouterr().out


def test_what_cannot_run_is_refused_before_it_is_queued(run_yaml, capsys):
    assert main(["launch", str(run_yaml), "--slurm", "--nodes", "2", "--gpus", "4", "parallel.shard=3"]) == 2
    assert "parallel: " in capsys.readouterr().err
    assert main(["launch", str(run_yaml), "--slurm", "--gpus", "0"]) == 2
    assert "--gpus: 0 is none" in capsys.readouterr().err


def test_a_file_that_is_there_is_kept(run_yaml, capsys):
    run_yaml.with_suffix(".sbatch").write_text("edited")
    assert main(["launch", str(run_yaml), "--slurm"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert run_yaml.with_suffix(".sbatch").read_text() == "edited"


# ---- Slurm's script, run -------------------------------------------------------------------------------------------

SRUN = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n'
SCONTROL = """#!/bin/sh
case "$1 $2" in
    "show hostnames") echo localhost ;;
    "show job") echo "JobState=RUNNING" ;;
    "requeue 77") echo again >> "$REQUEUED" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job on a cluster of one host."""
    programs = {"srun": SRUN, "scontrol": SCONTROL, "weft": '#!/bin/sh\nexec "$PYTHON" -m weft "$@"\n'}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "localhost", "REQUEUED": f"{tmp_path}/requeued", "OMP_NUM_THREADS": "1"}  # fmt: skip


def submitted(script: Path, cluster: dict[str, str], python: str) -> subprocess.Popen[str]:
    environment = {**cluster, "PYTHON": python}
    return subprocess.Popen(
        ["bash", str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def trained(config: Path, overrides: list[str]) -> Path:
    """Train in this process, as its rank; the file of the adapter."""
    run = load_config(config, overrides)
    train_run(run, lambda event: None)
    return run.folder / "adapter" / "adapter_model.safetensors"


@pytest.mark.slow
def test_a_preempted_job_comes_back_and_ends_with_the_adapter_of_an_unbroken_one(
    run_yaml, cluster, tmp_path, quick_python
):
    script, common = tmp_path / "broken.sbatch", ["schedule.steps=60", "save.every=0"]
    own = ["--out", str(script), "name=broken", *common]
    assert main(["launch", str(run_yaml), "--slurm", "--processes", "2", *own]) == 0
    unbroken, _ = spawn(2, trained, run_yaml, ["name=unbroken", *common])
    run = tmp_path / "runs" / "broken"
    log, finished = run / "events.rank0.jsonl", run / "adapter" / "adapter_model.safetensors"
    job = submitted(script, cluster, sys.executable)
    while not (log.is_file() and any(event["event"] == "step" for event in read_events(log))) and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B: says
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 143, said
    assert (tmp_path / "requeued").read_text() == "again\n" and not finished.exists(), said
    job = submitted(script, cluster, quick_python)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and "resumed from" in said, said
    whole, broken = load_file(unbroken), load_file(finished)
    assert whole.keys() == broken.keys() and all(torch.equal(broken[name], whole[name]) for name in whole)
    assert (tmp_path / "requeued").read_text() == "again\n"

"""weft launch: write the job file for a cluster, so that a preempted run comes back and goes on exactly."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.cli.jobs import Job
from weft.cli.jobs_kubernetes import pytorch_job, train_job
from weft.cli.jobs_skypilot import skypilot_task
from weft.cli.jobs_slurm import sbatch_script
from weft.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """A system that runs jobs. ending: of its file; submit: the command before the file's name."""

    write: Callable[[Job], str]
    ending: str
    submit: str
    says: str


KINDS: Mapping[str, Kind] = {
    "slurm": Kind(sbatch_script, ".sbatch", "sbatch", "a batch script for Slurm"),
    "skypilot": Kind(skypilot_task, ".sky.yaml", "sky jobs launch", "a managed job for SkyPilot"),
    "k8s": Kind(train_job, ".trainjob.yaml", "kubectl create -f", "a TrainJob for Kubeflow Trainer v2"),
    "k8s-v1": Kind(pytorch_job, ".pytorchjob.yaml", "kubectl create -f", "a PyTorchJob for Kubeflow's v1 operator"),
}


def run(argv: Sequence[str]) -> int:
    """Write the file, and say how it is submitted."""
    parser = argparse.ArgumentParser(prog="weft launch", description="Write a job file that trains a config.")
    parser.add_argument("config", type=Path, help="the run's YAML, as the job will find it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of weft train")
    kinds = parser.add_mutually_exclusive_group(required=True)
    for name, kind in KINDS.items():
        kinds.add_argument(f"--{name}", dest="kind", action="store_const", const=name, help=kind.says)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts (%(default)s)")
    parser.add_argument("--gpus", type=int, default=8, metavar="M", help="GPUs of each host (%(default)s)")
    parser.add_argument("--processes", type=int, metavar="N", help="in place of GPUs so many on each host's processor")
    parser.add_argument("--time", type=float, default=24, metavar="HOURS", help="Slurm: time limit (%(default)g)")
    parser.add_argument("--partition", default="", help="Slurm: partition")
    parser.add_argument("--accelerator", default="", metavar="NAME", help="SkyPilot: which GPU, such as H100 or A100")
    parser.add_argument("--image", default="", help="container image with weft in it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write; default: beside the config")
    arguments = parser.parse_intermixed_args(argv)

    from weft.run.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    refuse(arguments)
    config.parallel.resolved(arguments.nodes * (arguments.processes or arguments.gpus))
    job = Job(
        config.name, arguments.config, tuple(arguments.overrides), arguments.nodes, arguments.gpus,
        arguments.processes or 0, arguments.time, arguments.partition, arguments.image, arguments.accelerator,
    )  # fmt: skip
    kind = KINDS[arguments.kind]
    out = arguments.out or arguments.config.with_suffix(kind.ending)
    if out.exists() and arguments.out is None:
        raise ConfigError(f"{out} is there already, perhaps with edits of yours. Name another: --out FILE.")
    out.write_text(kind.write(job), encoding="utf-8")
    edits = len(re.findall(r"\bEDIT\b|\bedit:", out.read_text("utf-8")))
    print(f"{out}: {kind.says}" + (f"; look at {edits} places that say 'edit'." if edits else "."))
    print(f"Submit it: {kind.submit} {out}")
    if config.resume == "never":
        print("resume is 'never': a preempted job could not go on. Write resume: auto.", file=sys.stderr)
    return 0


def refuse(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for sizes that are none."""
    for name in ("nodes", "gpus", "processes", "time"):
        given = getattr(arguments, name)
        if given is not None and given <= 0:
            raise ConfigError(f"--{name}: {given:g} is none.")

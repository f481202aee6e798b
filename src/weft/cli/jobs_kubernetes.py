"""Jobs for Kubernetes through Kubeflow: a TrainJob of Trainer v2, or a PyTorchJob of the training operator v1."""

import json

from weft.cli.jobs import PORT, SAVING, Job

CLAIM = "EDIT-your-claim"  # a volume that all pods can write to


def train_job(job: Job) -> str:
    """The YAML of a TrainJob (trainer.kubeflow.org/v1alpha1) for `kubectl create -f FILE`."""
    return "\n".join(
        [
            *_head(job, "TrainJob"),
            "apiVersion: trainer.kubeflow.org/v1alpha1",
            "kind: TrainJob",
            "metadata:",
            f"  name: {json.dumps(label(job.name))}",
            "spec:",
            "  runtimeRef:",
            "    apiGroup: trainer.kubeflow.org",
            "    kind: ClusterTrainingRuntime",
            "    name: torch-distributed",
            "  trainer:",
            f"    image: {job.image or 'EDIT-image-with-weft'}",
            f"    numNodes: {job.nodes}",
            *_lines(_container(job, "PET_NODE_RANK", "PET_MASTER_ADDR"), 4),
            "    resourcesPerNode:",
            "      limits:",
            f"        {_limit(job)}",
            "  # A pod has 30 s from SIGTERM to its end, unless the runtime's terminationGracePeriodSeconds says more.",
            "  podTemplateOverrides:          # newer versions of Trainer call it runtimePatches",
            "    - targetJobs:",
            "        - name: node",
            "      spec:",
            *_lines(_volumes(), 8),
            "        containers:",
            "          - name: node",
            *_lines(_mounts(), 12),
            "",
        ]
    )


def pytorch_job(job: Job) -> str:
    """The YAML of a PyTorchJob (kubeflow.org/v1) for `kubectl create -f FILE`."""
    replicas = _replica(job, "Master", 1)
    if job.nodes > 1:
        replicas += _replica(job, "Worker", job.nodes - 1)
    return "\n".join(
        [
            *_head(job, "PyTorchJob"),
            "apiVersion: kubeflow.org/v1",
            "kind: PyTorchJob",
            "metadata:",
            f"  name: {json.dumps(label(job.name))}",
            "spec:",
            "  runPolicy:",
            "    cleanPodPolicy: Running",
            "    backoffLimit: 100             # a pod that was preempted is started again so often",
            "  pytorchReplicaSpecs:",
            *_lines(replicas, 4),
            "",
        ]
    )


def label(name: str) -> str:
    """A run's name as Kubernetes allows it: lower case letters, digits and dashes."""
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name.lower()).strip("-")


def _head(job: Job, kind: str) -> list[str]:
    return [
        f"# Trains {job.config} with weft, as a {kind} of Kubeflow. Submit: kubectl create -f THIS_FILE",
        f"# Edit what is called EDIT. The config and the data must be in the image or on the volume, under {_AT}.",
    ]


_AT = "/work"


def _replica(job: Job, role: str, count: int) -> list[str]:
    """One role's pods. Their container must be called pytorch."""
    return [
        f"{role}:",
        f"  replicas: {count}",
        "  restartPolicy: OnFailure",
        "  template:",
        "    spec:",
        f"      terminationGracePeriodSeconds: {SAVING}   # between SIGTERM and the end: a step and a checkpoint",
        *_lines(_volumes(), 6),
        "      containers:",
        "        - name: pytorch",
        f"          image: {job.image or 'EDIT-image-with-weft'}",
        *_lines(_container(job, "RANK", "MASTER_ADDR"), 10),
        "          resources:",
        "            limits:",
        f"              {_limit(job)}",
        *_lines(_mounts(), 10),
    ]


def _container(job: Job, number: str, first: str) -> list[str]:
    """Command and arguments of a pod. number, first: the operator's variables for its number and the first pod."""
    options = [job.devices()]
    if job.nodes > 1:
        options += [f"--nodes {job.nodes}", f'--node-rank "${number}"', f'--rendezvous "${first}:{PORT}"']
    # The operator counts pods in RANK and WORLD_SIZE; weft counts processes. exec: a SIGTERM must reach weft.
    command = job.train(*options, weft=("exec", "env", "-u", "RANK", "-u", "WORLD_SIZE", "weft"))
    return ["command: [sh, -c]", "args:", "  - |", f"    cd {_AT}", f"    {command}"]


def _limit(job: Job) -> str:
    return f"cpu: {job.processes}" if job.processes else f"nvidia.com/gpu: {job.gpus}"


def _volumes() -> list[str]:
    return [
        "volumes:",
        "  - name: work",
        "    persistentVolumeClaim:",
        f"      claimName: {CLAIM}",
        "  - name: shm                  # NCCL and data workers share memory between processes",
        "    emptyDir:",
        "      medium: Memory",
    ]


def _mounts() -> list[str]:
    return ["volumeMounts:", "  - name: work", f"    mountPath: {_AT}", "  - name: shm", "    mountPath: /dev/shm"]


def _lines(lines: list[str], indent: int) -> list[str]:
    return [" " * indent + line for line in lines]

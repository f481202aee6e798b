"""A task file for SkyPilot: a managed job that is brought back after a preemption and goes on."""

import json

from weft.cli.jobs import PORT, Job

STOPPED = (130, 143)  # exit codes of a run that was told to stop and has saved


def skypilot_task(job: Job) -> str:
    """The YAML for `sky jobs launch FILE`."""
    options = [job.devices()]
    device = f"  accelerators: {job.accelerator or 'H100'}:{job.gpus}   # edit: sky show-gpus lists them"
    meeting = []
    if job.nodes > 1:
        options += ['--nodes "$SKYPILOT_NUM_NODES"', '--node-rank "$SKYPILOT_NODE_RANK"']
        options += [f'--rendezvous "$FIRST:{PORT}"']
        meeting = ['  FIRST=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)']
    image = (
        [f"  image_id: docker:{job.image}"] if job.image else ["  # image_id: docker:IMAGE     # edit: one with weft"]
    )
    return "\n".join(
        [
            f"# Trains {job.config} with weft. Submit: sky jobs launch THIS_FILE",
            f"name: {json.dumps(job.name)}",
            f"num_nodes: {job.nodes}",
            "workdir: .                     # the config and the data that lie here are copied to each host",
            "resources:",
            f"  cpus: {job.processes}+" if job.processes else device,
            "  use_spot: true",
            *image,
            "  job_recovery:",
            "    strategy: EAGER_NEXT_REGION",
            "    max_restarts_on_errors: 3",
            f"    recover_on_exit_codes: [{', '.join(map(str, STOPPED))}]   # stopped, and saved",
            "file_mounts:",
            "  /runs:                       # every host must see the checkpoints, also a new one",
            "    source: s3://EDIT-your-bucket",
            "    mode: MOUNT",
            "setup: |",
            "  pip install 'weft[video]'    # edit: the extras that your model needs",
            "run: |",
            *meeting,
            f"  exec {job.train(*options)} output=/runs",
            "",
        ]
    )

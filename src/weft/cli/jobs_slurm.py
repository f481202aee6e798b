"""A batch script for Slurm: one srun over all hosts, and a requeue that goes on from what was saved."""

from weft.cli.jobs import PORT, SAVING, Job


def sbatch_script(job: Job) -> str:
    """The script for `sbatch FILE`."""
    lines = [
        "#!/bin/bash",
        f"# Trains {job.config} with weft. Submit: sbatch THIS_FILE. Edit what your cluster calls otherwise.",
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={job.nodes}",
        "#SBATCH --ntasks-per-node=1          # weft starts the processes of a host itself",
        *_devices(job),
        f"#SBATCH --time={job.clock()}",
        *([f"#SBATCH --partition={job.partition}"] if job.partition else ["##SBATCH --partition=gpu         # edit"]),
        "#SBATCH --output=%x.%j.log",
        "#SBATCH --open-mode=append           # a requeued job goes on in the same log",
        "#SBATCH --requeue                    # after a preemption or the loss of a host",
        f"#SBATCH --signal=B:TERM@{SAVING}          # seconds before the end of the time, to this script",
        "",
        "# edit: make weft callable, such as",
        "# source /path/to/venv/bin/activate",
        "",
        'FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"PORT=$(({PORT} + SLURM_JOB_ID % 10000))  # so that two jobs on one host do not meet",
        "",
        "# A preemption, or the end of the time, comes as SIGTERM: it is passed on, the run saves, and the job goes",
        "# into the queue again. weft then goes on from the checkpoint, exactly.",
        "STOPPED=",
        'stop() { STOPPED=1; kill -TERM "$TRAINING"; }',
        "trap stop TERM",
        "",
        _step(job),
        "TRAINING=$!",
        'while kill -0 "$TRAINING" 2>/dev/null; do wait "$TRAINING"; done  # a signal ends a wait before the training',
        'wait "$TRAINING"; CODE=$?',
        "",
        'if [ -n "$STOPPED" ] && [ "$CODE" -ne 0 ] && [ "$CODE" -ne 2 ]; then',
        '    case "$(scontrol show job "$SLURM_JOB_ID")" in',
        "        *JobState=CANCELLED*) ;;  # by scancel: it is not to come back",
        '        *) scontrol requeue "$SLURM_JOB_ID" ;;',
        "    esac",
        "fi",
        'exit "$CODE"',
    ]
    return "\n".join(lines) + "\n"


def _devices(job: Job) -> list[str]:
    """What each host gives."""
    if job.processes:
        return [f"#SBATCH --cpus-per-task={job.processes}            # edit: more cores for each process"]
    return [
        f"#SBATCH --gpus-per-node={job.gpus}            # some clusters want --gres=gpu:{job.gpus}",
        "#SBATCH --cpus-per-task=16           # edit: a few for each GPU",
    ]


def _step(job: Job) -> str:
    """The line that starts the run on every host, in the background: a shell hears signals only while it waits."""
    options = [job.devices()]
    if job.nodes > 1:
        # srun gives each host its number only in the environment of the task.
        options += [f"--nodes {job.nodes}", '--rendezvous "$FIRST:$PORT"']
    container = f"--container-image={job.image} " if job.image else ""
    # srun passes a SIGTERM on to its tasks and waits for them.
    return f"srun --kill-on-bad-exit=1 {container}{job.train(*options)} &"

"""A gallery of run folders, each with something that a reader must bear: `python -m tests.dashboard.folders DIR`.

Every builder takes the folder of runs and the present time, and returns the run's folder. GALLERY has all by name.
`--hold SECONDS` keeps the living ones alive for so long: their heartbeats go on, and `training` makes steps.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.dashboard.written import TEXT, VIDEO, RunWriter
from weft import events

LONG = 100_000
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def finished(root: Path, now: float, name: str = "finished") -> Path:
    """200 steps with validation, checkpoints, samples of the base and of two steps, adapter health."""
    run = RunWriter(root / name, now - 3600)
    run.begin()
    run.evaluated(0)
    run.sampled(0, adapter=False)
    for step in range(1, 201):
        run.step(step)
        if step % 50 == 0:
            run.evaluated(step)
            save(run, step)
        if step % 100 == 0:
            run.sampled(step)
    write_health(run, range(50, 201, 50))
    run.tell(events.Exported(step=200, folder=str(run.folder / "adapter")))
    run.end(200)
    run.gpu_file()
    return run.folder


def save(run: RunWriter, step: int) -> None:
    run.tell(events.PhaseStarted(phase="saving"), after=0.5)
    run.tell(events.Saved(step=step, folder=str(run.folder / "checkpoints" / f"global_step_{step}")), after=0.5)


def write_health(run: RunWriter, steps: range, layers: int = 12) -> None:
    paths = [f"blocks.{n}.attn1.{part}" for n in range(layers) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    with (run.folder / "health.jsonl").open("a") as file:
        for step in steps:
            change = [step / run.steps * (0.002 + 0.001 * (i % 7)) for i in range(len(paths))]
            rank = [1 + 15 * step / run.steps * (1 - i / len(paths)) for i in range(len(paths))]
            line = {"time": run.clock.now, "step": step, "role": "default", "kind": "lora", "rank": 16, "paths": paths,
                    "change": change, "effective_rank": rank}  # fmt: skip
            file.write(json.dumps(line) + "\n")


def long(root: Path, now: float, name: str = "long", steps: int = LONG) -> Path:
    """100,000 steps of seven metrics each, with one spike in 40,000 and a validation every 5,000."""
    run = RunWriter(root / name, now - 1.6 * steps, steps=steps)
    run.begin()
    more = {"default__lr_2": 1.6e-3, "default__max_norm__scaled": 3.0, "default__max_norm__mean": 0.4}
    for begin in range(0, steps, steps // 20):
        end = begin + steps // 20
        told = range(begin + 1, end + 1)
        run.many(run.stepped(step, ("train",), 1.5, **more, **SPIKE.get(step / steps, {})) for step in told)
        run.evaluated(end)
    run.end(steps)
    run.gpu_file(every=steps // 1000)
    return run.folder


SPIKE = {0.4: {"train__loss": 9.0}}  # share of the steps -> what is unlike there


def one_point(root: Path, now: float) -> Path:
    """A single step, just done."""
    run = RunWriter(root / "one-point", now - 15)
    run.trains(alive=True)
    run.begin()
    run.step(1)
    run.gpu_file()
    run.beats("training", 1)
    return run.folder


def no_points(root: Path, now: float) -> Path:
    """The model is still being loaded, and clips encoded: 37 of 100."""
    run = RunWriter(root / "no-points", now - 30)
    run.trains(alive=True)
    run.tell(events.PhaseStarted(phase="starting"))
    run.tell(events.PhaseStarted(phase="caching", total=100), after=5)
    run.clock.now = now
    run.beats("caching", 0, total_steps=None, done=37, total=100, note="clips/37.mp4")
    return run.folder


def eight_gpus(root: Path, now: float) -> Path:
    """Eight ranks that train, each with its log and its GPU's file."""
    run = RunWriter(root / "eight-gpus", now - 100 * 1.5 - 12)
    for rank in range(8):
        run.trains(alive=True, rank=rank)
    run.begin(world=8)
    for step in range(1, 101):
        for rank in range(8):
            run.chance = random.Random(step)  # losses are of all ranks together
            run.clock.now -= 1.5 if rank else 0
            run.step(step, rank=rank)
    for rank in range(8):
        run.gpu_file(rank, rank)
        run.beats("training", 100, rank=rank, world=8)
    return run.folder


def experts(root: Path, now: float) -> Path:
    """Two experts of Wan 2.2, 50 steps each in turn."""
    config = {**VIDEO, "family": {"kind": "wan", "source": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"}}
    run = RunWriter(root / "experts", now - 400, config)
    run.begin()
    for step in range(1, 201):
        run.step(step, ("high",) if (step - 1) // 50 % 2 == 0 else ("low",))
        if step % 50 == 0:
            run.evaluated(step, ("high", "low"))
    run.end(200)
    run.gpu_file()
    return run.folder


def distillation(root: Path, now: float) -> Path:
    """A critic in each step and a student in every fifth."""
    run = RunWriter(root / "distillation", now - 400)
    run.begin()
    for step in range(1, 201):
        student = {"student__distance": 0.5, "student__gap": 0.3 - step / 1000} if step % 5 == 0 else {}
        run.step(step, ("critic", "student") if student else ("critic",), **student)
    run.end(200)
    run.gpu_file()
    return run.folder


def text(root: Path, now: float) -> Path:
    """A language model: replies in place of videos, and no noise levels."""
    run = RunWriter(root / "text", now - 400, TEXT)
    run.begin(trainable=4_587_520)
    run.replied(0, {"Who are you?": "I am a language model, created by somebody."}, adapter=False)
    for step in range(1, 201):
        run.step(step, train__probability=0.3 + step / 400)
        if step % 100 == 0:
            run.tell(events.Evaluated(step=step, loss=1.9 - step / 400, baseline=2.1, by_time={}, baseline_by_time={},
                                      items=6, failed=0, standard_error=0.05))  # fmt: skip
            run.replied(step, {"Who are you?": "I am Weft's small model, created to be helpful."})
    run.end(200)
    run.gpu_file()
    return run.folder


SCORED = {"accuracy": lambda value: value, "ece": lambda value: (1 - value) / 2}  # metric -> what it is of an accuracy


def continual(root: Path, now: float) -> Path:
    """Four experiences in order, each scored on all: what came before is slowly forgotten."""
    run = RunWriter(root / "continual", now - 400, TEXT)
    names = ("reviews", "news", "questions", "topics")
    run.begin()
    before = dict.fromkeys(names, 0.25)
    for metric, of in SCORED.items():
        run.tell(
            events.Scored(step=0, after="(untrained)", metric=metric, scores={n: of(v) for n, v in before.items()})
        )
    for step in range(1, 201):
        run.step(step)
        if step % 50 == 0:
            learned = step // 50 - 1
            scores = {name: 0.9 - 0.06 * (learned - i) if i <= learned else 0.25 for i, name in enumerate(names)}
            for metric, of in SCORED.items():
                told = {name: of(value) for name, value in scores.items()}
                run.tell(events.Scored(step=step, after=names[learned], metric=metric, scores=told), after=5)
    run.end(200)
    run.gpu_file()
    return run.folder


def crashed(root: Path, now: float) -> Path:
    """Killed at step 81: the process's file and its last heartbeat stand, and no event says that it ended."""
    run = begun(root / "crashed", now, alive=False)
    (run.folder / "run.rank0.log").write_text(
        "12:00:01 the model is ready\n12:01:07 validated at step 50: 0.2046 (base 0.3600)\n"
        "Fatal Python error: Segmentation fault\n"
    )
    return run.folder


def failed(root: Path, now: float) -> Path:
    """Two steps of which nothing was learned, then an error that it could tell."""
    run = begun(root / "failed", now, alive=None)
    for step in (80, 81):
        kept = run.folder / "incidents" / f"step_{step:06d}_train"
        kept.mkdir(parents=True)
        run.tell(events.Incident(step=step, phase="train", reason="the gradient is not finite", folder=str(kept),
                                 in_a_row=step - 79))  # fmt: skip
    run.end(81, "failed", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    run.gpu_file()
    lines = (
        "12:01:07 the loop begins",
        "Traceback (most recent call last):",
        "torch.OutOfMemoryError: CUDA out of memory",
    )
    (run.folder / "run.rank0.log").write_text("\n".join(lines) + "\n")
    return run.folder


def stopped(root: Path, now: float) -> Path:
    run = begun(root / "stopped", now, alive=None)
    save(run, 81)
    run.end(81, "stopped")
    run.gpu_file()
    return run.folder


def training(root: Path, now: float) -> Path:
    """In the midst of it."""
    return begun(root / "training", now, alive=True, samples=True).folder


def paused(root: Path, now: float) -> Path:
    """Told to pause, an hour ago."""
    run = begun(root / "paused", now - 3600, alive=True)
    run.tell(events.Controlled(step=81, id="1", command="pause", arguments={}, by="dashboard", done=True))
    run.tell(events.PhaseStarted(phase="paused"))
    told, run.clock.now = run.clock.now, now
    run.beats("paused", 81, progress=told)
    return run.folder


def stalled(root: Path, now: float) -> Path:
    """The process lives, and has given no sign of work for ten minutes."""
    run = begun(root / "stalled", now - 600, alive=True)
    told, run.clock.now = run.clock.now, now
    run.beats("training", 81, progress=told)
    return run.folder


def begun(folder: Path, now: float, alive: bool | None, samples: bool = False) -> RunWriter:
    """81 of 200 steps, the last of them now. alive: None for a process that signed off."""
    run = RunWriter(folder, now - 81 * 1.5 - 12 - 6.5 - (6 if samples else 0))
    if alive is not None:
        run.trains(alive)
    run.begin()
    run.evaluated(0)
    if samples:
        run.sampled(0, adapter=False)
        run.sampled(0)
    for step in range(1, 82):
        run.step(step)
        if step == 50:
            run.evaluated(step)
    run.gpu_file()
    if alive is not None:
        run.beats("training", 81)
    return run


def corrupt(root: Path, now: float) -> Path:
    """Good lines among garbage: NULs, no UTF-8, a line of 5 MB, events of no known kind, half a last line."""
    run = RunWriter(root / "corrupt", now - 400)
    run.begin()
    log = run.folder / "events.rank0.jsonl"
    for step in range(1, 101):
        run.step(step)
        if step == 19:
            run.gpu_file()
        if step % 20 == 0:
            with log.open("ab") as file:
                file.write(GARBAGE[step // 20 - 1])
    with log.open("ab") as file:
        file.write(b'{"time": 1795274532.48, "event": "step", "st')
    (run.folder / "health.jsonl").write_bytes(b"\x00\x00{}\n[1, 2]\n")
    return run.folder


GARBAGE = (
    b"\x00" * 4096 + b"\n",
    b'{"time": 1, "event": "step", "step": "\xff\xfe"}\n',
    b'{"time": 1, "event": "notice", "text": "' + b"x" * (5 << 20) + b'"}\n',
    b'{"time": 1, "event": "of a later weft", "step": 3}\n[]\n12\n{"event": "step"}\n',
    b'{"time": 1, "event": "step", "step": 1e999, "metrics": {"train/loss": "high"}, "seconds": []}\n',
)


def resumed(root: Path, now: float) -> Path:
    """Killed at step 130, resumed from 100 with other losses, finished."""
    run = RunWriter(root / "resumed", now - 1000)
    run.begin()
    for step in range(1, 131):
        run.step(step, train__loss=5.0 if step > 100 else 1.0)
        if step == 100:
            save(run, step)
            run.sampled(step)
    run.clock.now += 300
    run.begin(step=100)
    run.sampled(100)
    for step in range(101, 201):
        run.step(step, train__loss=0.5)
    run.end(200)
    run.gpu_file()
    return run.folder


def hostile(root: Path, now: float) -> Path:
    """Words that a page must show and not obey: in prompts, notices, reasons, names of metrics and of experiences."""
    config = {**TEXT, "samples": {"prompts": [HOSTILE]}, "family": {"kind": "causal-lm", "source": HOSTILE}}
    run = RunWriter(root / "odd & <b>names<b> 'of' %2F földers", now - 400, config)
    run.begin()
    run.tell(events.Notice(text=HOSTILE))
    run.replied(0, {HOSTILE: HOSTILE}, adapter=False)
    for step in range(1, 51):
        run.step(step, **{f"train/{HOSTILE}": 1.0})
    run.replied(50, {HOSTILE: HOSTILE})
    run.tell(events.Incident(step=50, phase=HOSTILE, reason=HOSTILE, folder=None, in_a_row=1))
    run.tell(events.Scored(step=50, after=HOSTILE, metric=HOSTILE, scores={HOSTILE: 0.5}))
    (run.folder / "run.rank0.log").write_text(f"error: {HOSTILE}\n")
    run.end(50, "failed", HOSTILE)
    run.gpu_file()
    return run.folder


Builder = Callable[[Path, float], Path]
GALLERY: dict[str, Builder] = {
    "finished": finished, "one-point": one_point, "no-points": no_points, "eight-gpus": eight_gpus, "experts": experts,
    "distillation": distillation, "text": text, "continual": continual, "crashed": crashed, "failed": failed,
    "stopped": stopped, "training": training, "paused": paused, "stalled": stalled, "corrupt": corrupt,
    "resumed": resumed, "hostile": hostile, "long": long,
}  # fmt: skip


def hold(root: Path, seconds: float) -> None:
    """Keep the living runs alive; `training` makes a step every 1.5 s until its 200 are done."""
    end, step = time.time() + seconds, 81
    run = RunWriter.reopened(root / "training", time.time())
    while time.time() < end:
        for path in root.glob("*/heartbeat.rank*.json"):
            beat = json.loads(path.read_text())
            if path.parent.name in ("one-point", "no-points", "eight-gpus", "training", "paused", "stalled"):
                sign = {} if path.parent.name in ("paused", "stalled") else {"progress": time.time()}
                path.write_text(json.dumps({**beat, "time": time.time(), **sign}))
        if step < 200:
            step += 1
            run.clock.now = time.time() - 1.5
            run.step(step)
            run.gpu_file()
            run.beats("training", step)
        time.sleep(1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a gallery of run folders.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=GALLERY, default=list(GALLERY))
    parser.add_argument("--hold", type=float, default=0.0, metavar="SECONDS", help="keep the living ones alive")
    arguments = parser.parse_args()
    for name in arguments.only:
        print(GALLERY[name](arguments.folder, time.time()), flush=True)
    if arguments.hold and "training" in arguments.only:
        hold(arguments.folder, arguments.hold)


if __name__ == "__main__":
    main()

"""weft init --distill: a config that makes a model need a few steps, on captions alone or on clips."""

from collections.abc import Sequence
from pathlib import Path

from weft.cli.init_text import Lines
from weft.cli.models import WAN_I2V, KnownModel
from weft.config.show import inline
from weft.data.manifest import MANIFEST_ENDINGS
from weft.data.prompt_files import read_prompts
from weft.errors import ConfigError, DataError, did_you_mean

RANK = 64  # of VideoX-Fun's LoRA distillation; a concept's is half of it
CRITIC_FASTER = 4  # the critic's learning rate over the student's: docs/guides/distillation.md
EVERY = 5  # steps of the critic for one of the student: DMD2, Self-Forcing
LONGER = 3  # than a concept's run: at every fifth step alone the student moves
SHOWN = 2  # captions that are sampled while training


def captions_in(known: KnownModel, data: Path) -> list[str]:
    """The captions of a file that has them; none for clips. Raises ConfigError where clips are needed, DataError."""
    if not data.exists():
        siblings = [path.name for path in data.parent.iterdir()] if data.parent.is_dir() else []
        near = f" {did_you_mean(data.name, siblings)}" if siblings else ""
        raise DataError(f"--data: there is no '{data}' (in {Path.cwd()}).{near}")
    needs_clips = known.does == WAN_I2V
    if data.suffix.lower() == ".txt" and needs_clips:
        raise ConfigError(f"--data: '{data}' has captions alone, and this model {known.does}. Give it clips.")
    if needs_clips or not data.is_file() or data.suffix.lower() not in (".txt", *MANIFEST_ENDINGS):
        return []
    return [prompt.text for prompt in read_prompts(data).prompts]


def adapter_lines() -> Lines:
    return [
        ("adapter:", "of the student, and of the critic unless roles say otherwise"),
        ("  kind: lora", ""),
        (f"  rank: {RANK}", "VideoX-Fun's; more than a concept needs, for the whole way to a video changes"),
        (f"  alpha: {RANK}", "strength is alpha / rank: 1"),
        ("  targets: attention+ffn", "VideoX-Fun adapts q, k, v and ffn; weft plan lists them"),
        ("", ""),
    ]


def learning_lines(known: KnownModel) -> Lines:
    """Objective, optimizers and schedule. The rates of known models are a fifth of a concept's: a LoRA takes more than
    whole weights do, and less here than where the target stands still."""
    steps, lr, critic_lr = LONGER * known.steps, rounded(known.lr / 5), rounded(known.lr / 5 * CRITIC_FASTER)
    low = [(f"  guidance_low: {known.guidance_low}", "of the low network's teacher")] if known.guidance_low else []
    turns = [("  turn: 50", "steps of one network's student and critic before the other's turn")]
    return [
        ("objective:", ""),
        ("  kind: dmd", "distribution matching: DMD2, with Self-Forcing's way to the later steps"),
        ("  steps: 4", "that the student will need; 1 to 8"),
        ("  shift: null", "of the list of steps; null: the model's own, weft plan shows them"),
        (f"  student_every: {EVERY}", "the critic must keep up with the student: DMD2's and Self-Forcing's"),
        (f"  guidance: {known.guidance}", "of the teacher, as one samples it; Self-Forcing's 3 is 4 here, 1: off"),
        *low,
        ('  negative: ""', "negative prompt of the teacher; the student will need none"),
        *(turns if known.experts else []),
        ("", ""),
        ("optimizer:", "of the student"),
        ("  kind: adamw", ""),
        (
            f"  lr: {inline(lr)}",
            "VideoX-Fun's LoRA: 1e-5; Self-Forcing's whole weights: 2e-6; halve it when samples break",
        ),
        ("  betas: [0.0, 0.999]", "no momentum, for the critic moves too: DMD2's and Self-Forcing's"),
        ("", ""),
        ("roles:", "what a part has of its own"),
        ("  critic:", ""),
        ("    optimizer:", ""),
        ("      kind: adamw", ""),
        (
            f"      lr: {inline(critic_lr)}",
            f"{CRITIC_FASTER} times the student's: a LoRA must keep up; whole weights take 1/5, as in Self-Forcing",
        ),
        ("      betas: [0.0, 0.999]", "as the student's"),
        ("", ""),
        ("schedule:", ""),
        (f"  steps: {steps}", f"of the critic; the student moves {steps // EVERY} times"),
        (
            f"  accumulate: {known.accumulate}",
            "micro-batches per step; the larger the steadier, Self-Forcing has 64 captions",
        ),
        ("  curve: constant", "as Self-Forcing's"),
        (f"  warmup: {known.warmup}", "of each part's own steps, in which its rate rises"),
        ("", ""),
        ("ema:", "of the student alone; it is what is sampled and exported"),
        ("  decay: 0.99", "Self-Forcing's"),
        (f"  start: {min(200, steps // 10)}", "step; the first ones are not worth a place in the average"),
        ("", ""),
        ("engine:", ""),
        ("  precision: auto", "bf16 where the device has it"),
        (f"  recompute: {inline(known.recompute)}", "true: less memory, about a third slower"),
        ("", ""),
    ]


def rounded(rate: float) -> float:
    """A learning rate without the last bits of a quotient."""
    return float(f"{rate:.3g}")


def prompt_lines(known: KnownModel, data: Path) -> Lines:
    width, height, frames = known.sample
    return [
        ("data:", ""),
        ("  kind: prompts", "captions alone: the student learns from what it makes itself"),
        (f"  files: [{inline(data.as_posix())}]", "a caption a line, or a manifest's"),
        ("  buckets:", "shapes that the student will be sampled in"),
        (f"    sizes: [[{width}, {height}]]", "pixels"),
        (f"    frames: [{frames}]", "of the form 4k+1"),
        (f"  batch_size: {known.batch}", "captions per micro-batch: the first to lower for memory"),
        ("  cache: disk", "encode each caption once; kept in weft-cache"),
        ("", ""),
    ]


def watching_lines(known: KnownModel, captions: Sequence[str]) -> Lines:
    width, height, frames = known.sample
    prompts = list(captions[:SHOWN])
    such = "such as [{text: a red fox runs, image: fox.png}]" if known.does == WAN_I2V else "such as [a red fox runs]"
    every = LONGER * known.every
    return [
        ("samples:", "of the student by its own steps, and of the base for comparison"),
        (f"  every: {every}", "steps between videos, once there are prompts"),
        (f"  prompts: {inline(prompts)}", "the first captions" if prompts else such),
        (f"  width: {width}", "pixels"),
        (f"  height: {height}", "pixels"),
        (f"  frames: {frames}", "of the form 4k+1"),
        ("  steps: 40", "of the base"),
        (f"  guidance: {known.guidance}", f"of the base; {known.reason_guidance}"),
        *([(f"  guidance_low: {known.guidance_low}", "of the low network")] if known.guidance_low else []),
        ("", ""),
        ("save:", ""),
        (f"  every: {every}", "steps between checkpoints"),
        ("  keep: 3", "newest checkpoints that stay on the disk"),
        ("  formats: [peft, diffusers]", "of the student's adapter; its header tells the steps"),
    ]

"""The config of a run: one model whose sections are the objects that they describe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from weft import plugins
from weft.config.parse import parse
from weft.config.source import Source, read_source
from weft.engines.parallel import Parallel
from weft.run.roles import Rate, Role, role_of
from weft.section import Section

OF_TEXT = ("peft", "transformers")  # formats that programs for language models and encoders read
USUAL = ("peft", "diffusers", "transformers")  # written when none are named, where the kind and the model have them
ENGINE = "torch"  # the engine of a config that names none


class Schedule(Section):
    """How long to train, how many micro-batches make a step, and how the learning rate moves."""

    steps: int = Field(default=1000, ge=1, description="optimizer steps of the whole run")
    epochs: float | None = Field(
        default=None, gt=0, description="passes over the data of the whole run, in place of steps; null: steps"
    )
    accumulate: int = Field(
        default=1, ge=1, description="micro-batches of each process whose gradients are summed into one step"
    )
    global_batch: int | None = Field(
        default=None,
        ge=1,
        description="items of a step on all processes together, from which accumulate then follows; null: what "
        "batch_size, accumulate and the number of processes make",
    )
    max_norm: float = Field(default=1.0, ge=0, description="gradients are scaled down to this global norm; 0: never")
    curve: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="after the warm-up: constant, or falling to floor x lr at the last step"
    )
    warmup: int = Field(default=0, ge=0, description="steps in which the learning rate rises from 0 to lr")
    floor: float = Field(default=0.0, ge=0, le=1, description="share of lr that is left at the last step")
    incidents: int = Field(default=5, ge=1, description="stop after so many steps in a row without a finite gradient")
    reset_optimizer: bool = Field(
        default=False,
        description="of a stream of documents: forget the optimizers' moments where a new experience begins; false "
        "keeps those of the one before, which pull towards it for a while",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "Schedule":
        said = self.model_fields_set
        for one, other in (("epochs", "steps"), ("global_batch", "accumulate")):
            if getattr(self, one) is not None and other in said:
                raise ValueError(f"schedule.{one} decides schedule.{other}. Leave one of them out.")
        return self

    @model_serializer(mode="wrap")
    def _without_what_follows(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Saved without the numbers that others decide, so that they are found anew for other processes."""
        follows = {"steps": self.epochs is not None, "accumulate": self.global_batch is not None}
        return {name: value for name, value in plain(self).items() if not follows.get(name)}

    @model_validator(mode="after")
    def _warmup_ends(self) -> "Schedule":
        if self.epochs is None and self.warmup >= self.steps:
            raise ValueError(f"schedule.warmup is {self.warmup}, but the run has only {self.steps} steps. Lower it.")
        return self


class Save(Section):
    """When the run saves itself, and in which formats adapters are written."""

    every: int = Field(default=250, ge=0, description="steps between checkpoints; 0: only at the end")
    every_epochs: float = Field(default=0, ge=0, description="also after so many passes over the data; 0: never")
    keep: int = Field(default=3, ge=1, description="newest checkpoints that are kept")
    keep_best: int = Field(
        default=0, ge=0, description="beside them so many with the lowest validation loss; 0: none for that"
    )
    prune_adapters: bool = Field(
        default=False, description="delete global_step_N/, the adapter, together with the checkpoint of its step"
    )
    background: bool = Field(
        default=True, description="write checkpoints while training goes on; false: training waits for the disk"
    )
    health: bool = Field(
        default=True,
        description="with each checkpoint and validation, measure in health.jsonl how far each adapted layer moved",
    )
    formats: tuple[str, ...] = Field(
        default=(),
        description="formats of the saved adapter: peft, diffusers, comfyui, musubi, videox-fun, original; none: peft, "
        "and diffusers too for a LoRA on a video model",
    )

    @model_validator(mode="after")
    def _formats_exist(self) -> "Save":
        from weft.errors import did_you_mean

        for name in self.formats:
            if name not in plugins.table("format"):
                raise ValueError(f"no format is called '{name}'. {did_you_mean(name, sorted(plugins.table('format')))}")
        return self


class Ema(Section):
    """An exponential moving average of the adapter weights, saved beside them and used for samples and export."""

    decay: float = Field(default=0.99, gt=0, lt=1, description="share of the average that stays at each step")
    start: int = Field(default=0, ge=0, description="step from which on it averages; before, it equals the weights")


class Validation(Section):
    """Loss on held-out clips, on the same noise each time, with the adapter-off loss as the baseline."""

    every: int = Field(default=250, ge=0, description="steps between validations, also at start and end; 0: never")
    seed: int = Field(default=0, ge=0, description="seed of the fixed noise")


class Prompt(Section):
    """One video to make: a text, and the first frame for a model that goes on from an image. A bare text will do."""

    text: str = Field(description="what to generate")
    image: Path | None = Field(default=None, description="first frame, for image-to-video models; cut to the size")

    @model_validator(mode="before")
    @classmethod
    def _bare_text(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> Any:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


class Samples(Section):
    """Videos made during training from the same noise, once with the base alone for comparison."""

    every: int = Field(default=0, ge=0, description="steps between samples; 0: only at the end, when there are prompts")
    prompts: tuple[Prompt, ...] = Field(
        default=(), description="what to generate: texts, or {text: ..., image: FILE} to go on from an image"
    )
    tokens: int = Field(default=128, ge=1, description="of a language model: tokens of the longest reply")
    frames: int = Field(default=81, ge=1, description="frames of a sample, of the form 4k+1")
    width: int = Field(default=832, ge=8, description="pixels")
    height: int = Field(default=480, ge=8, description="pixels")
    steps: int = Field(default=30, ge=1, description="denoising steps")
    guidance: float = Field(
        default=5.0, ge=0, description="classifier-free guidance g in u + g(c-u), 1: off; HunyuanVideo's own input"
    )
    guidance_low: float | None = Field(
        default=None, ge=0, description="guidance of the low expert of two; null: as guidance"
    )
    experts: Literal["all", "trained"] = Field(
        default="all",
        description="networks that make a sample when one of two experts is trained: both, the other one without an "
        "adapter, or the trained one alone",
    )
    negative: str = Field(default="", description="negative prompt of the guidance")
    seed: int = Field(default=0, ge=0, description="seed of the noise")
    baseline: bool = Field(default=True, description="also sample the base without the adapter, once")


class Tracking(Section):
    """Experiment trackers that hear of each step, beside the run's own files."""

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(),
        description="tensorboard: files in the run's folder; wandb; trackio; none: the run's own files alone",
    )
    project: str = Field(default="weft", description="name under which wandb and trackio gather runs")
    offline: bool = Field(default=False, description="wandb: keep all here, to be sent later by `wandb sync`")


class RunConfig(Section):
    """One training run. Every run has its own folder, output/name."""

    name: str = Field(pattern=r"^[\w][\w.-]*$", description="name of the run and of its folder")
    output: Path = Field(default=Path("runs"), description="folder that holds the run folders")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="decides the adapter's first weights, data order and noise"
    )
    family: plugins.union("family") = Field(description="the frozen model")  # type: ignore[valid-type]
    adapter: plugins.union("adapter") = Field(description="what is trained on it")  # type: ignore[valid-type]
    objective: plugins.union("objective") = Field(description="what is learned from a batch")  # type: ignore[valid-type]
    optimizer: plugins.union("optimizer") = Field(description="how the weights move")  # type: ignore[valid-type]
    roles: dict[str, Role] = Field(
        default_factory=dict,
        description="of an objective that trains several parts, what each has of its own: {critic: {optimizer: ...}}",
    )
    data: plugins.union("data") = Field(description="clips, captions, conversations or documents")  # type: ignore[valid-type]
    engine: plugins.union("engine") = Field(  # type: ignore[valid-type]
        default_factory=lambda: plugins.find("engine", ENGINE)(), description="device and precision"
    )
    parallel: Parallel = Field(default_factory=Parallel, description="how several processes share the work")
    schedule: Schedule = Field(default_factory=Schedule, description="length, accumulation, learning-rate curve")
    ema: Ema | None = Field(default=None, description="moving average of the adapter; leave out for none")
    validation: Validation = Field(default_factory=Validation, description="loss on held-out clips")
    samples: Samples = Field(default_factory=Samples, description="videos made while training")
    save: Save = Field(default_factory=Save, description="checkpoints and adapter formats")
    track: Tracking = Field(default_factory=Tracking, description="TensorBoard, wandb, trackio")
    resume: str = Field(
        default="auto",
        description="auto: continue when the run folder has a checkpoint; latest: it must have one; never: start anew "
        "in an empty folder; or the path of a checkpoint",
    )
    resume_allow: tuple[str, ...] = Field(
        default=(), description="dotted keys that may differ from the checkpoint's config, such as optimizer.lr"
    )

    @model_validator(mode="after")
    def _the_best_is_known(self) -> "RunConfig":
        if self.save.keep_best and not self.validation.every:
            raise ValueError(
                "save.keep_best: the best checkpoint is that with the lowest validation loss, and validation.every is "
                "0. Write validation.every, or leave save.keep_best out"
            )
        return self

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_by_default(cls, value: Any) -> Any:
        return {"kind": ENGINE, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_medium(self) -> "RunConfig":
        medium = self.family.medium
        for slot in ("data", "objective"):
            section = getattr(self, slot)
            if section.medium != medium:
                fitting = [k for k, t in plugins.section_types(slot).items() if t.medium == medium]
                raise ValueError(
                    f"{slot}.kind: '{section.kind}' is for {section.medium} models, and family '{self.family.kind}' "
                    f"is a {medium} model. Write {slot}.kind={' or '.join(fitting)}"
                )
        return self

    @model_validator(mode="after")
    def _has_experiences(self) -> "RunConfig":
        if self.schedule.reset_optimizer and self.family.medium != "documents":
            raise ValueError(
                "schedule.reset_optimizer: only documents come in several experiences, and this run has one. Leave it "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _roles_exist(self) -> "RunConfig":
        from weft.errors import did_you_mean

        parts = self.objective.parts
        known = [*parts, *(f"{part}_{expert}" for part in parts for expert in ("high", "low"))]
        for name in self.roles:
            if not parts:
                raise ValueError(
                    f"roles.{name}: objective '{self.objective.kind}' trains one part, which has the run's own "
                    "adapter, optimizer and schedule. Leave roles out"
                )
            if name not in known:
                raise ValueError(f"roles.{name}: this objective has no such part. {did_you_mean(name, known)}")
            own = self.roles[name].adapter
            if own is not None and name.partition("_")[0] == parts[0]:
                raise ValueError(f"roles.{name}.adapter: the {parts[0]} has the run's own. Write it under adapter")
            if own is not None and own.start_from is not None:
                raise ValueError(
                    f"roles.{name}.adapter.start_from: only the {parts[0]} goes on from an earlier one. Leave it out"
                )
        return self

    @model_validator(mode="after")
    def _data_is_enough(self) -> "RunConfig":
        if not (self.data.has_latents or self.objective.data_free):
            fitting = [k for k, t in plugins.section_types("objective").items() if t.medium == "video" and t.data_free]
            raise ValueError(
                f"data.kind: '{self.data.kind}' has captions and no clips, and objective '{self.objective.kind}' "
                f"learns from clips. Write data.kind=video, or objective.kind={' or '.join(fitting)}"
            )
        return self

    @model_validator(mode="after")
    def _adapter_fits(self) -> "RunConfig":
        own = {f"roles.{name}.adapter": role.adapter for name, role in self.roles.items()}
        for key, adapter in {"adapter": self.adapter, **own}.items():
            if adapter is not None and (reason := adapter.refusal(self.family.medium)):
                raise ValueError(f"{key}: {reason}")
        if self.engine.recompute and self.adapter.recompute:
            raise ValueError(f"engine.recompute: adapter.{self.adapter.recompute}. Write engine.recompute=false")
        return self

    @model_validator(mode="after")
    def _adapter_has_formats(self) -> "RunConfig":
        if not self.adapter.formats:
            raise ValueError(
                f"adapter.kind: no file format holds an adapter of kind {self.adapter.kind}, so it is for roles that "
                "are not exported, such as roles.critic.adapter. Write adapter.kind=lora"
            )
        odd = [name for name in self.save.formats if name not in self._known_formats]
        if odd:
            raise ValueError(
                f"save.formats: an adapter of kind {self.adapter.kind} on a {self.family.medium} model is written as "
                f"{', '.join(self._known_formats)}, not as {odd[0]}{self.adapter.limit}"
            )
        return self

    def adapter_of(self, role: str) -> Any:
        """The recipe of a role's adapter."""
        return role_of(self.roles, role).adapter or self.adapter

    def optimizer_of(self, role: str) -> Any:
        """What moves a role."""
        return role_of(self.roles, role).optimizer or self.optimizer

    def rate_of(self, role: str) -> Rate:
        """How the learning rate of a role moves."""
        own, run = role_of(self.roles, role), self.schedule
        if self.family.medium == "documents" and role in self.objective.steady:
            return Rate("constant", 0, 0.0, max_norm=0.0)  # it cuts its gradients itself, group by group

        def chosen(name: str) -> Any:
            value = getattr(own, name)
            return getattr(run, name) if value is None else value

        return Rate(chosen("curve"), chosen("warmup"), chosen("floor"), chosen("max_norm"))

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that adapters are written in."""
        return self.save.formats or tuple(name for name in self._known_formats if name in USUAL)

    @property
    def _known_formats(self) -> tuple[str, ...]:
        """What an adapter of this kind, on a model of this medium, can be written as."""
        if self.family.medium != "video" or (self.adapter.kind == "lokr" and self.family.kind == "hunyuan-video"):
            # Other programs fuse HunyuanVideo's q, k and v, and LoKrs of them make none together.
            return tuple(name for name in self.adapter.holders if name in OF_TEXT)
        return self.adapter.holders

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.output / self.name

    def resolved(self) -> dict[str, Any]:
        """Plain data that parses to an equal config."""
        return self.model_dump(mode="json")


# Keys that change no number of the training: a resumed run may differ in them without being told so.
FREE_ON_RESUME = ("name", "output", "resume", "resume_allow", "save", "samples", "validation", "track",
                  "data.cache", "data.cache_shards",
                  "data.cache_folder", "data.unreadable", "data.dropped", "data.too_short", "data.workers",
                  "engine.stream_blocks", "engine.offload_inputs", "engine.offload_activations",
                  "engine.experts", "engine.pinned",
                  # How many processes there are, and how they share: "items_per_step" among the inputs must stay.
                  "parallel", "schedule.accumulate", "schedule.global_batch", "engine.kind", "engine.read",
                  "engine.timeout", "engine.zero", "engine.offload_optimizer", "engine.offload_parameters",
                  "engine.verified_copy",
                  # What computes the same another way, to rounding.
                  "family.lean", "family.attention", "family.kernels", "adapter.fused", "engine.compile",
                  "engine.activation_budget", "engine.recompute", "engine.graphs")  # fmt: skip


# Keys that a saved state cannot be fitted to when they change.
FIXED_ON_RESUME = (
    "family", "adapter.kind", "adapter.rank", "adapter.targets", "adapter.exclude", "adapter.dora", "adapter.conv_rank",
    "adapter.init", "adapter.factor", "adapter.decompose_both", "adapter.block_size", "adapter.share_blocks",
    "adapter.series", "adapter.bias", "adapter.tokens", "adapter.hidden", "adapter.network", "adapter.projection",
    "objective.kind", "optimizer.kind", "optimizer.path", "ema", "inputs.network",
)  # fmt: skip


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML with dotted overrides. Raises ConfigError with every problem at once."""
    return parse_config(read_source(Path(path), overrides))


def parse_config(source: Source) -> RunConfig:
    """The run that a read source describes."""
    config = parse(RunConfig, source)
    assert isinstance(config, RunConfig)
    return config

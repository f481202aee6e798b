"""What a report tells of a run's origin and of its adapter's use: versions, fingerprints, commands, lines of Python."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.dashboard.report_parts import code, facts, paragraph
from weft.errors import ModelError
from weft.few_steps import StepList
from weft.formats.header import read_header

PEFT_FILE, DIFFUSERS_FILE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
WHOLE_FILE = "model.safetensors"  # of an encoder all of whose weights were trained
OTHER_FILES = tuple(f"lora_{program}.safetensors" for program in ("comfyui", "musubi", "videox_fun", "original"))
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Adapter:
    """A finished adapter in a run's folder, or the newest of a step. metadata: what its header says of its origin."""

    folder: Path
    metadata: Mapping[str, str]

    @property
    def items(self) -> int | None:
        """How many items it was trained on; None where they were streamed or the file does not say."""
        count = self.metadata.get("weft.data.items", "")
        return int(count) if count.isdecimal() else None

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()


def adapters_of(run: Path) -> list[Adapter]:
    """The finished adapters, of two experts two; before the end those of the newest step."""
    finished = (path for path in run.glob("adapter*") if path.is_dir())
    folders = sorted(path for path in finished if "-" not in path.name)  # adapter-peft is an export of one
    if not folders:
        steps = [path for path in run.glob("global_step_*") if path.name.split("_")[2].isdecimal()]
        newest = max((int(path.name.split("_")[2]) for path in steps), default=None)
        folders = sorted(path for path in steps if int(path.name.split("_")[2]) == newest)
    found = []
    for folder in folders:
        file = next(
            (
                folder / name
                for name in (PEFT_FILE, DIFFUSERS_FILE, WHOLE_FILE, *OTHER_FILES)
                if (folder / name).is_file()
            ),
            None,
        )
        if file is not None:
            try:
                found.append(Adapter(folder, read_header(file).metadata))
            except ModelError:  # cut short while it is being written, or damaged: then it is none to tell of
                continue
    return found


def origin(environment: Run, adapters: Sequence[Adapter], run: Run, config: Run) -> Iterator[str]:
    """Versions, machine, commit, fingerprints, and how to do it again."""
    versions = ", ".join(f"{name} {v}" for name, v in (environment.get("versions") or {}).items() if v)
    told: Mapping[str, str] = next((adapter.metadata for adapter in adapters), {})
    yield facts(
        [
            ("Versions", versions),
            ("Python", environment.get("python")),
            ("System", environment.get("platform")),
            ("Device", environment.get("device")),
            ("Cores", environment.get("cores")),
            ("Commit of the working folder", environment.get("git")),
            ("Seed", config["resolved"].get("seed")),
            ("Fingerprint of the data", told.get("weft.data")),
            ("Fingerprint of the base model", told.get("weft.base")),
            ("Resumed", ", ".join(f"at step {one['step']:,}" for one in run["resumes"])),
        ]
    )
    argv = environment.get("argv")
    if argv:
        yield paragraph("To do it again: save the config above as run.yaml and start it. It was started with:")
        started = shlex.join([Path(argv[0]).name, *argv[1:]]).replace("'~/", "~'/")
        yield code(f"{started}\n\nweft train run.yaml", "Commands")


def use(run: Run, config: Run, adapters: Sequence[Adapter]) -> Iterator[str]:
    """How Weft, PEFT and diffusers load the adapter; nothing while there is none."""
    if not adapters:
        return
    folder = config.get("name") or run["name"]
    if run["medium"] == "documents":
        yield code(_classifier(config, run["model"], f"{folder}/{adapters[0].folder.name}"), "With transformers")
        return
    yield code(f'weft sample {shlex.quote(str(folder))} --prompt "..." --compare', "With Weft")
    steps = next(
        (adapter.metadata["weft.step_list"] for adapter in adapters if "weft.step_list" in adapter.metadata), ""
    )
    if steps:
        yield paragraph(f"A student of few steps: {_few(steps)}.")
    source = config.get("family.source") or run["model"]
    if run["medium"] == "text":
        yield code(_peft(source, f"{folder}/{adapters[0].folder.name}"), "With PEFT")
    elif all(adapter.has(DIFFUSERS_FILE) for adapter in adapters):
        yield code(_diffusers(source, [f"{folder}/{adapter.folder.name}" for adapter in adapters]), "With diffusers")
    if run["medium"] != "text":
        yield code(f"weft export {shlex.quote(str(folder))} --to comfyui", "Elsewhere: or musubi, videox-fun, original")


def _few(text: str) -> str:
    try:
        return f"{StepList.from_json(text)}, guidance 1"
    except ValueError:
        return "its header is damaged"


def _peft(source: str, adapter: str) -> str:
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({source!r}), {adapter!r})"
    )


def _classifier(config: Run, source: str, adapter: str) -> str:
    """An encoder with its head: a folder of its own where all was trained, else what PEFT puts on the source."""
    of = "from transformers import AutoModelForSequenceClassification"
    if config.get("adapter.kind") == "none":
        return f"{of}\n\nmodel = AutoModelForSequenceClassification.from_pretrained({adapter!r})"
    labels = config.get("family.labels")
    count = f", num_labels={len(labels)}" if isinstance(labels, list) and labels else ""
    model = f"AutoModelForSequenceClassification.from_pretrained({source!r}{count})"
    return f"from peft import PeftModel\n{of}\n\nmodel = PeftModel.from_pretrained({model}, {adapter!r})"


def _diffusers(source: str, adapters: Sequence[str]) -> str:
    """Of two experts the low one belongs to the pipeline's second transformer."""
    lines = ["from diffusers import DiffusionPipeline", "", f"pipe = DiffusionPipeline.from_pretrained({source!r})"]
    for adapter in adapters:
        expert = adapter.rpartition("adapter_")[2] if "adapter_" in adapter else ""
        more = f", adapter_name={expert!r}" if expert else ""
        more += ", load_into_transformer_2=True" if expert == "low" else ""
        lines.append(f"pipe.load_lora_weights({adapter!r}, weight_name={DIFFUSERS_FILE!r}{more})")
    return "\n".join(lines)

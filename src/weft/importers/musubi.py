"""musubi-tuner: its dataset TOML, its --config_file, its launch scripts and command lines."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.data.musubi import SOURCES, Dataset, data_section
from weft.errors import ConfigError, DataError
from weft.importers.draft import Draft, ReadFile
from weft.importers.flags import Arity
from weft.importers.launchers import Launch, launch_of, put_launcher, script_of
from weft.importers.musubi_flags import ARITY, REASONS, SAME
from weft.importers.musubi_model import BASES, NO_SUCH_TASK, Base, put_adapter, put_model
from weft.importers.musubi_samples import put_prompts
from weft.importers.musubi_times import put_experts, put_times
from weft.importers.musubi_training import put_engine, put_optimizer, put_saving, put_schedule
from weft.importers.reading import read
from weft.importers.shell_words import Script
from weft.importers.values import Given, Theirs, carry, drop_left

OTHERS = "hv|hv_1_5|fpack|flux_kontext|flux_2|qwen_image|zimage|kandinsky5|krea2|ideogram4|hidream_o1"
SCRIPTS = rf"(?:wan_train_network|(?:{OTHERS})_train(?:_network)?(?:_self_flow)?)\.py"
OWN = {"network_module", "dataset_config", "dit", "timestep_sampling", "discrete_flow_shift", "blocks_to_swap", "t5"}


class Musubi:
    """Reads any of musubi's files, alone or together."""

    name = "musubi-tuner"

    def recognises(self, file: ReadFile) -> float:
        """By the name of the training script, by the keys of a dataset, or by those of an argument file."""
        if isinstance(file.content, Script):
            if script_of(file, SCRIPTS):
                return 1.0
            flags = {word.text.lstrip("-").partition("=")[0] for line in file.content.commands for word in line.words}
            return 0.8 if file.kind == "args" and len(flags & OWN) >= 3 else 0.0
        if file.kind != "toml":
            return 0.0
        if is_dataset(file):
            return 0.95
        given = flattened(file)
        known = sum(key in ARITY for key in given)
        return 0.9 * known / len(given) if len(OWN & set(given)) >= 2 else 0.0

    def read(self, files: Sequence[ReadFile], draft: Draft) -> None:
        """The whole run; of a dataset file alone, the data, with the rest to be filled in."""
        datasets = [file for file in files if file.kind == "toml" and is_dataset(file)]
        others = [file for file in files if file not in datasets]
        if not others:
            _put_data(datasets[0].path, draft)
            _put_unknown_model(draft)
            return
        launch = _launch(others, self.name)
        theirs = launch.theirs
        base = _base(launch, self.name)
        dataset = _dataset(theirs, datasets, others[0].path)
        put_saving(theirs, draft)
        put_model(theirs, draft, base)
        put_adapter(theirs, draft, base)
        put_times(theirs, draft, _size(dataset))
        put_experts(theirs, draft, base)
        put_optimizer(theirs, draft)
        put_schedule(theirs, draft)
        put_engine(theirs, draft)
        carry(theirs, draft, SAME)
        _put_data(dataset, draft)
        _put_samples(theirs, draft, base, others[0].path)
        put_launcher(launch, draft)
        drop_left(theirs, draft, REASONS, ARITY)


# ---- Files ----------------------------------------------------------------------------------------------------------


def is_dataset(file: ReadFile) -> bool:
    """Whether a TOML has musubi's [[datasets]], not those of kohya's sd-scripts, which have subsets."""
    tables = file.content.get("datasets")
    if not isinstance(tables, list):
        return False
    first = [table for table in tables if isinstance(table, dict)]
    return any(set(table) & {*SOURCES, *Dataset.model_fields} and "subsets" not in table for table in first)


def flattened(file: ReadFile) -> dict[str, Given]:
    """All keys of an argument file; the names of its sections mean nothing."""
    given: dict[str, Given] = {}
    for name, value in file.content.items():
        inner = {(name, key): item for key, item in value.items()} if isinstance(value, dict) else {(name,): value}
        given |= {path[-1]: Given(item, file.place(*path)) for path, item in inner.items()}
    return given


def _launch(files: Sequence[ReadFile], program: str) -> Launch:
    """The command line over the argument file, whose keys it overrides."""
    tomls = [file for file in files if file.kind == "toml"]
    scripts = [file for file in files if isinstance(file.content, Script)]
    if not tomls and not scripts:
        raise ConfigError(
            f"{files[0].path}: {program} has argument files in TOML and command lines, and this is neither."
        )
    launch = launch_of(scripts[0], SCRIPTS, _arity, program) if scripts else None
    if launch is not None and not tomls and "config_file" in launch.theirs:
        named = Path(str(launch.theirs.take("config_file")))
        tomls = [read(_found(named.with_suffix(".toml"), scripts[0].path, launch.theirs.place("config_file")))]
    given: dict[str, Given] = {}
    for file in tomls:
        given |= flattened(file)
    if launch is None:
        script = "hv_train_network.py" if {"text_encoder1", "dit_in_channels"} & set(given) else "wan_train_network.py"
        return Launch(script, str(tomls[0].path), Theirs(given, program), Theirs({}, "the launcher"), {})
    theirs = Theirs({**given, **launch.theirs.given}, program)
    return Launch(launch.script, launch.place, theirs, launch.launcher, launch.environment)


def _arity(script: str) -> Mapping[str, Arity]:
    return ARITY


def _found(path: Path, beside: Path, place: str) -> Path:
    """A file that another names: from the working folder, or beside it. Raises ConfigError."""
    for candidate in (path, beside.parent / path, beside.parent / path.name):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{place}: there is no '{path}', neither here ({Path.cwd()}) nor beside {beside}.")


def _base(launch: Launch, program: str) -> Base:
    """The model of a script and its task. Raises ConfigError for those that Weft does not train."""
    script, theirs = launch.script or "wan_train_network.py", launch.theirs
    if not launch.script and "text_encoder1" in theirs:
        script = "hv_train_network.py"
    if script == "hv_train_network.py":
        return BASES["hunyuan-video"]
    if script != "wan_train_network.py":
        raise ConfigError(
            f"{launch.place}: {script} is {program}'s trainer of another model, or of all weights. Weft imports "
            "wan_train_network.py and hv_train_network.py."
        )
    if theirs.flag("one_frame"):
        raise ConfigError(f"{theirs.place('one_frame')}: Weft has no one-frame training.")
    task = theirs.choice("task", [*BASES, *NO_SUCH_TASK], "t2v-14B")
    if task in NO_SUCH_TASK or task == "hunyuan-video":
        raise ConfigError(
            f"{theirs.place('task')}: task {task} trains {NO_SUCH_TASK.get(task, 'no Wan')}; Weft has none."
        )
    return BASES[task]


# ---- Data and samples -----------------------------------------------------------------------------------------------


def _dataset(theirs: Theirs, datasets: Sequence[ReadFile], beside: Path) -> Path | None:
    """The dataset file: given by the user, or named by theirs, whether it is there or not."""
    named = theirs.text("dataset_config")
    if datasets:
        return datasets[0].path
    if named is None:
        return None
    candidates = (Path(named), beside.parent / named, beside.parent / Path(named.replace("\\", "/")).name)
    return next((path for path in candidates if path.is_file()), Path(named))


def _size(dataset: Path | None) -> tuple[int, int] | None:
    """Width and height of the first dataset."""
    if dataset is None or not dataset.is_file():
        return None
    content = read(dataset).content
    value = content.get("datasets", [{}])[0].get("resolution") or content.get("general", {}).get("resolution")
    if isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return value[0], value[1]
    return (value, value) if isinstance(value, int) else None


def _put_data(dataset: Path | None, draft: Draft) -> None:
    """The section `data`: the dataset file as keys of ours, or its path where it is not here."""
    draft.set("data.kind", "video", "dataset_config", theirs=str(dataset or ""))
    if dataset is None:
        draft.ask(
            "data.sources", [{"path": "FILL-IN/clips"}], "musubi's dataset TOML, or a folder of clips with captions"
        )
        draft.ask("data.buckets", {"sides": [512], "frames": [1, 33]}, "sizes and frames, unless the sources say them")
    elif not dataset.is_file() and dataset.suffix.lower() != ".toml":  # it would count as a folder of clips
        named = f"{dataset} is not here: import it together with this, or name a folder of clips with captions"
        draft.ask("data.sources", [{"path": "FILL-IN/clips"}], named)
        draft.ask("data.buckets", {"sides": [512], "frames": [1, 33]}, "sizes and frames, which stand in that file")
    elif not dataset.is_file():
        draft.set("data.sources", [{"path": dataset.as_posix()}], "dataset_config", "Weft reads this file itself")
        draft.warn(
            f"{dataset} is not here; data.sources names it as it stands. Its batch_size goes to data.batch_size."
        )
    else:
        _put_sections(dataset, draft)
    # musubi never leaves a caption out; ours does so for one clip in ten.
    draft.assume("data.caption_dropout", 0.0, "musubi trains on every caption")


def _put_sections(dataset: Path, draft: Draft) -> None:
    try:
        section, notices = data_section(dataset)
    except DataError as error:
        raise ConfigError(
            *(re.sub(r"^(.*?), line (\d+):", r"\1:\2:", line) for line in str(error).split("\n"))
        ) from None
    for key, value in section.items():
        if key != "kind":
            draft.set(f"data.{key}", value, dataset.name, _ABOUT_DATA.get(key, ""), theirs=_of_datasets(key, dataset))
    for notice in notices:
        draft.warn(notice)
    if len({*_batch_sizes(dataset)}) > 1:
        draft.warn(f"{dataset}: its datasets have batch sizes of their own; data.batch_size is the largest, for all.")


_ABOUT_DATA = {"buckets": "areas and frame counts", "batch_size": "clips of one micro-batch"}


def _of_datasets(key: str, dataset: Path) -> Any:
    return {"sources": "[[datasets]]", "buckets": "resolution, target_frames", "batch_size": "batch_size"}.get(key, "")


def _batch_sizes(dataset: Path) -> list[int]:
    content = read(dataset).content
    shared = content.get("general", {}).get("batch_size", 1)
    return [table.get("batch_size", shared) for table in content["datasets"]]


def _put_samples(theirs: Theirs, draft: Draft, base: Base, beside: Path) -> None:
    named = theirs.text("sample_prompts")
    if named is None:
        return
    found = next(
        (path for path in (Path(named), beside.parent / named, beside.parent / Path(named).name) if path.is_file()),
        None,
    )
    if found is None:
        draft.drop("sample_prompts", named, "The file is not here. Write its prompts under samples.prompts.")
        return
    put_prompts(found, draft, "guidance_scale" if base.kind == "hunyuan-video" else "cfg_scale", base.image)


def _put_unknown_model(draft: Draft) -> None:
    """What a dataset file does not say."""
    draft.assume("name", "imported", "a dataset file names no run")
    draft.ask("family.kind", "wan", "wan or hunyuan-video")
    if draft.model:
        draft.assume("family.source", draft.model, "--model")
    else:
        draft.ask("family.source", "FILL-IN/model", "the model's folder")
    draft.assume("adapter.kind", "lora", "a dataset file says nothing of it")
    draft.assume("objective.kind", "flow-matching", "a dataset file says nothing of it")
    draft.assume("optimizer.kind", "adamw", "a dataset file says nothing of it")

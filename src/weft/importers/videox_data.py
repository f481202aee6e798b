"""VideoX-Fun's data options: clips or captions, sizes, frames, token budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.importers.draft import Draft
from weft.importers.values import Theirs
from weft.importers.videox_model import ConfiguredWan

# Height and width of ASPECT_RATIO_RANDOM_CROP_512, videox_fun/data/bucket_sampler.py, as (width, height) at 512.
CROPS = (
    (768, 320), (704, 352), (672, 384), (608, 416), (576, 448), (544, 480), (512, 480), (512, 512), (480, 512),
    (480, 544), (448, 576), (416, 608), (384, 672), (352, 704), (320, 768),
)  # fmt: skip
# random_hw_adapt divides the size by these; the largest base that the size reaches counts.
DIVIDERS = (
    (1536, (1, 1.25, 1.5, 2, 2.5, 3)), (1024, (1, 1.25, 1.5, 2)), (768, (1, 1.25, 1.5)), (0, (1,)),
)  # fmt: skip
LARGEST = 16384  # pixels or frames; more is a slip of the finger
STEP_OF_SIDES = 128  # between the sizes of training_with_video_token_length


def put_data(theirs: Theirs, draft: Draft, model: ConfiguredWan, captions_alone: bool) -> None:
    """The section `data`. captions_alone: distillation that needs no clips."""
    frames, side = _within(theirs, "video_sample_n_frames", 17), _within(theirs, "video_sample_size", 512)
    whole = (frames - 1) // 4 * 4 + 1
    if whole != frames:
        draft.warn(f"video_sample_n_frames {frames} is not of the form 4k+1; {whole} are used, as by their code.")
    batch = theirs.whole("train_batch_size")
    path, root = theirs.text("train_data_meta"), theirs.text("train_data_dir")
    if captions_alone:
        _put_prompts(theirs, draft, side, whole, path)
    else:
        _put_clips(theirs, draft, path, root)
        _put_buckets(theirs, draft, model, side, whole)
        draft.assume("data.extraction", {"kind": "random"}, "theirs draws the first frame; here once for each clip")
        if theirs.flag("random_frame_crop"):
            note = "a share of batches; whole latent frames, which their code miscounts"
            draft.set("data.random_frames", 0.1, "random_frame_crop", note, True)
        if workers := theirs.whole("dataloader_num_workers", 0):
            draft.set("data.workers", workers, "dataloader_num_workers", "threads that decode clips")
    if batch is None:
        draft.assume("data.batch_size", 16, "their default train_batch_size")
        draft.warn("train_batch_size is not given, and their default 16 needs much memory; 1 is usual.")
    else:
        draft.set("data.batch_size", batch, "train_batch_size")


def _put_prompts(theirs: Theirs, draft: Draft, side: int, frames: int, path: str | None) -> None:
    draft.set("data.kind", "prompts", "train_mode", "captions alone: the student makes its own samples", "normal")
    if path is None:
        draft.ask("data.files", ["FILL-IN/captions.json"], "captions: .txt, or their metadata.json")
    else:
        draft.set("data.files", [path], "train_data_meta", "its captions alone")
    draft.set("data.buckets.sides", [side], "video_sample_size", "in five ratios; theirs draws of forty")
    draft.set("data.buckets.frames", [frames], "video_sample_n_frames")
    for key in ("train_data_dir", "image_sample_size", "token_sample_size", "video_sample_stride", "video_repeat",
                "enable_bucket", "random_hw_adapt", "training_with_video_token_length", "random_ratio_crop",
                "random_frame_crop", "fix_sample_size", "dataloader_num_workers"):  # fmt: skip
        if key in theirs:
            draft.drop(key, theirs.take(key), "It is about clips, and this distillation reads captions alone.")
    if "vae_mini_batch" in theirs:
        draft.drop("vae_mini_batch", theirs.take("vae_mini_batch"), "No clip is encoded.")


def _put_clips(theirs: Theirs, draft: Draft, path: str | None, root: str | None) -> None:
    draft.assume("data.kind", "video", "clips with captions")
    if path is None and root is None:
        draft.ask(
            "data.sources", [{"path": "FILL-IN/metadata.json"}], "their metadata.json or .csv, or a folder of clips"
        )
        return
    source: dict[str, Any] = {"path": path or root}
    repeats, stride = theirs.whole("video_repeat", 0) or 0, theirs.whole("video_sample_stride")
    two = [{**source, "only": "video"}, {**source, "only": "image"}]
    draft.set(
        "data.sources", two if repeats > 1 else [source], "train_data_meta" if path else "train_data_dir", theirs=path
    )
    places = range(2 if repeats > 1 else 1)
    if path is not None and root is not None:
        if Path(root) == Path(path).parent:
            draft.drop("train_data_dir", root, "Paths in a manifest count from its own folder, which this is.")
        else:
            for place in places:
                draft.set(f"data.sources.{place}.root", root, "train_data_dir")
    if repeats > 1:
        draft.set("data.sources.0.repeats", repeats, "video_repeat", "of videos; images are shown once")
    elif "video_repeat" in theirs:
        draft.drop("video_repeat", repeats, "Every clip is shown once in an epoch.")
    if stride is None:
        draft.warn("video_sample_stride is not given; their default 4 takes every fourth frame, and so does this run.")
    for place in places if stride != 1 else ():
        note = "of frames at the training rate, to which clips are resampled"
        draft.set(f"data.sources.{place}.stride", stride or 4, "video_sample_stride", note)


def _put_buckets(theirs: Theirs, draft: Draft, model: ConfiguredWan, side: int, frames: int) -> None:
    """Sizes and frame counts of clips, under their names for how they are drawn."""
    counts = list(range(frames, 0, -4))
    image = _within(theirs, "image_sample_size", 512)
    fixed = theirs.numbers("fix_sample_size")
    adapt, by_tokens = theirs.flag("random_hw_adapt"), theirs.flag("training_with_video_token_length")
    bucketed, crop = theirs.flag("enable_bucket"), theirs.flag("random_ratio_crop")
    token = _within(theirs, "token_sample_size", 512)
    draft.set("data.buckets.frames", counts, "video_sample_n_frames", "a clip takes the longest that it fills", frames)
    draft.assume("data.buckets.upscale", True, "theirs scales every clip to its size")
    if fixed:
        _put_fixed(theirs, draft, fixed, model.side)
        _ignored(
            draft, {"enable_bucket": bucketed, "random_ratio_crop": crop, "random_hw_adapt": adapt}, "fix_sample_size"
        )
        return
    sides = _sides(theirs, draft, side, image, adapt, by_tokens)
    if crop and bucketed:
        sizes = [_floored(w * one // 512, h * one // 512, model.side) for one in sides for w, h in CROPS]
        note = "every clip in each ratio; theirs draws one"
        draft.set("data.buckets.sizes", sizes, "random_ratio_crop", note, True)
        draft.set("data.buckets.choice", "each_size", "random_ratio_crop", theirs=True)
        draft.set("data.buckets.crop_slack", 1.0, "random_ratio_crop", theirs=True)
    elif bucketed:
        names = "video_sample_size" if len(sides) == 1 else "video_sample_size, image_sample_size"
        note = "areas; each clip keeps its own aspect ratio"
        draft.set("data.buckets.sides", sides, names, note, side if len(sides) == 1 else f"{side}, {image}")
        draft.set("data.buckets.choice", "largest", "enable_bucket", theirs=True)
    else:
        _ignored(draft, {"random_ratio_crop": crop}, "a run without enable_bucket")
        draft.set("data.buckets.sizes", [[one, one] for one in sides], "video_sample_size", "squares", side)
    if len(sides) > 1:
        of = "training_with_video_token_length" if by_tokens and adapt else "random_hw_adapt"
        draft.set("data.buckets.choice", "each_size", of, "an item in each size; theirs draws one", True)
    if by_tokens and adapt:
        budget = ((frames - 1) // 4 + 1) * (token // model.side) ** 2
        note = "tokens; theirs overshoots where sizes are large"
        draft.set("data.buckets.token_budget", budget, "token_sample_size", note, token)
    elif "token_sample_size" in theirs:
        why = "training_with_video_token_length together with random_hw_adapt"
        draft.drop("token_sample_size", token, f"It needs {why}.")
    if image != side and not (by_tokens and adapt):
        key = "data.buckets.image_sides" if bucketed and not crop else "data.buckets.image_sizes"
        draft.set(key, [image] if key.endswith("sides") else [[image, image]], "image_sample_size")


def _put_fixed(theirs: Theirs, draft: Draft, fixed: Sequence[float], multiple: int) -> None:
    if len(fixed) != 2:
        raise theirs.refused("fix_sample_size", "two numbers, height and width")
    height, width = (int(value) for value in fixed)
    note = "theirs squeezes the picture; here it is cut"
    draft.set("data.buckets.sizes", [_floored(width, height, multiple)], "fix_sample_size", note, f"{height} {width}")


def _sides(theirs: Theirs, draft: Draft, side: int, image: int, adapt: bool, by_tokens: bool) -> list[int]:
    """The nominal sizes among which theirs draws."""
    if by_tokens and not adapt:
        draft.warn("training_with_video_token_length: without random_hw_adapt their code takes no notice of it.")
    if by_tokens and adapt:
        if image < side:
            raise ConfigError(
                f"{theirs.place('image_sample_size' if 'image_sample_size' in theirs else 'video_sample_size')}: "
                f"image_sample_size {image} is below video_sample_size {side}, which leaves no size to draw from."
            )
        return list(range(side, image + 1, STEP_OF_SIDES))
    if adapt:
        dividers = next(found for base, found in DIVIDERS if side >= base)
        if len(dividers) == 1:
            draft.drop("random_hw_adapt", True, f"At video_sample_size {side} it has one size to draw from.")
        return sorted({int(side / divider) for divider in dividers})
    return [side]


def _ignored(draft: Draft, flags: dict[str, bool], by: str) -> None:
    for name, given in flags.items():
        if given:
            draft.drop(name, True, f"It has no part in {by}.")


def _within(theirs: Theirs, key: str, usual: int) -> int:
    """A number of pixels or frames."""
    value = theirs.whole(key, usual)
    if value is None or not 1 <= value <= LARGEST:
        raise theirs.refused(key, f"a whole number from 1 to {LARGEST}")
    return value


def _floored(width: int, height: int, multiple: int) -> list[int]:
    return [width // multiple * multiple, height // multiple * multiple]

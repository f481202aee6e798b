"""What diffusion-pipe's files may say: its models, and its keys without an equivalent here, with the reason."""

from collections.abc import Mapping

SECTIONS = ("model", "adapter", "optimizer", "monitoring")
MODELS = (
    "wan", "hunyuan-video", "flux", "ltx-video", "sdxl", "cosmos", "lumina_2", "chroma", "hidream", "sd3",
    "cosmos_predict2", "anima", "omnigen2", "qwen_image", "hunyuan_image", "auraflow", "z_image", "hunyuan_video_15",
    "flux2", "ernie_image", "ltx2", "ideogram4", "krea2", "minimax_h3",
)  # fmt: skip
SECRETS = ("monitoring.wandb_api_key",)

STAGES = "Weft has no pipeline of stages. It spreads the weights over GPUs instead: parallel.shard."
LOSS = "Weft's loss is the mean squared error of the velocity."
PROGRESS = "Weft keeps every step."
EVALUATED = "Weft measures validation in the batches of training, one clip after the other."
CAPTIONS = "Weft trains on each caption as it stands, encoded once."
ASPECTS = "Weft keeps each clip's own aspect ratio, to the pixel grid of the model; no list of ratios is needed."
PICTURE_ONLY = "Weft trains on clips and captions alone, without masks or control pictures."


def _each(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


REASONS: Mapping[str, str] = {
    **_each("pipeline_stages partition_method partition_split", STAGES),
    **_each("reentrant_activation_checkpointing", "Weft's recomputing needs no reentrant way."),
    "image_micro_batch_size_per_gpu": "Weft's batches are of one size: data.batch_size.",
    **_each("pseudo_huber_c huber_delta smooth_l1_beta", LOSS),
    **_each("eval_micro_batch_size_per_gpu eval_gradient_accumulation_steps image_eval_micro_batch_size_per_gpu "
            "eval_image_micro_batch_size_per_gpu disable_block_swap_for_eval", EVALUATED),
    "eval_every_n_epochs": "Weft measures after steps: validation.every.",
    "eval_every_n_examples": "Weft measures after steps: validation.every.",
    "eval_before_first_step": "Weft always measures at the start and at the end.",
    **_each("checkpoint_every_n_epochs checkpoint_every_n_minutes",
            "Weft's checkpoints hold adapter and state together: save.every, in steps."),
    "save_dtype": "Weft saves adapters in fp32; 'weft convert' writes bf16 or fp16.",
    "map_num_proc": "Weft takes the number of cores: data.workers.",
    "compile": "Weft does not compile the network.",
    **_each("steps_per_print logging_steps x_axis_examples", PROGRESS),
    "regenerate_cache": "Weft's cache finds out by itself what is stale.",
    "resume_from_checkpoint": "Weft goes on from its own checkpoints by itself: resume: auto.",
    "model.cache_text_embeddings": "Weft encodes captions once and keeps them: data.cache.",
    "model.text_encoder_fp8": "Weft encodes first and then frees the encoder, so it needs no smaller one.",
    "model.merge_adapters": "Weft trains on the base as it is. Merge first: weft merge ADAPTER --into BASE.",
    "adapter.fuse_adapters": "Weft trains on the base as it is. Merge first: weft merge ADAPTER --into BASE.",
    "adapter.dtype": "Weft's adapters are fp32 while they train, so that small steps are not lost.",
    "adapter.alpha": "diffusion-pipe itself refuses it: its alpha is the rank, and so is Weft's when nothing is said.",
    "adapter.rank_dropout": "Weft's LoKr has no dropout.",
    "optimizer.beta2_half_life": "Weft takes betas as they are; 0.5 ** (batch / half life) is the second.",
    "optimizer.gradient_release": "Weft sums gradients over micro-batches, and so keeps them until the step.",
    "optimizer.stabilize": "It belongs to diffusion-pipe's own 8-bit AdamW.",
    "monitoring.wandb_api_key": "Secrets do not belong into a config, and it was not copied. Log in: wandb login.",
    "monitoring.wandb_run_name": "Trackers get the run's name.",
}  # fmt: skip

DATA_REASONS: Mapping[str, str] = {
    **_each("min_ar max_ar num_ar_buckets ar_buckets", ASPECTS),
    **_each("cache_shuffle_num cache_shuffle_delimiter shuffle_tags online_captions", CAPTIONS),
    "shuffle_metadata": "Weft draws a new order for each epoch.",
    **_each("mask_path default_mask_file control_path", PICTURE_ONLY),
    "subsample_ratio": "Weft trains on all clips; data.share takes one of n equal parts.",
}  # fmt: skip

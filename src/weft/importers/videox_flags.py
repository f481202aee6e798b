"""All options of VideoX-Fun's LoRA trainers for Wan 2.1 and 2.2, and why some have no equivalent here."""

from collections.abc import Mapping

from weft.importers.flags import Arity
from weft.importers.values import Same

# Source: scripts/wan2.2/train_lora.py and train_distill_lora.py at 804a425; those of wan2.1 have no boundary_type.
_FLAGS = """
    random_flip use_came multi_stream gradient_checkpointing scale_lr use_8bit_adam allow_tf32 push_to_hub
    report_model_info use_peft_lora train_text_encoder snr_loss uniform_sampling enable_text_encoder_in_dataloader
    enable_bucket random_ratio_crop random_frame_crop random_hw_adapt training_with_video_token_length
    auto_tile_batch_size motion_sub_loss keep_all_node_same_token_length save_state use_deepspeed use_fsdp low_vram
    use_ema
"""
_VALUES = """
    input_perturbation pretrained_model_name_or_path revision variant train_data_dir train_data_meta max_train_samples
    negative_prompt output_dir cache_dir seed train_batch_size vae_mini_batch num_train_epochs max_train_steps
    gradient_accumulation_steps learning_rate learning_rate_critic lr_scheduler lr_warmup_steps non_ema_revision
    dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm hub_token prediction_type
    hub_model_id logging_dir mixed_precision report_to local_rank checkpointing_steps checkpoints_total_limit
    resume_from_checkpoint noise_offset validation_epochs validation_steps tracker_project_name rank network_alpha
    motion_sub_loss_ratio train_sampling_steps token_sample_size video_sample_size image_sample_size
    video_sample_stride video_sample_n_frames video_repeat config_path transformer_path vae_path tokenizer_max_length
    boundary_type train_mode gen_update_interval fake_guidance_scale real_guidance_scale lora_skip_name target_name
    weighting_scheme logit_mean logit_std mode_scale
"""
_LISTS = "validation_prompts validation_paths fix_sample_size denoising_step_indices_list"

ARITY: Mapping[str, Arity] = {
    **dict.fromkeys(_FLAGS.split(), "flag"),
    **dict.fromkeys(_VALUES.split(), "one"),
    **dict.fromkeys(_LISTS.split(), "many"),
}

SAME = (
    Same("seed", "seed", "whole", "numbers are drawn in another order, so not the same noise"),
    Same("gradient_accumulation_steps", "schedule.accumulate", "whole"),
    Same("max_grad_norm", "schedule.max_norm", "number"),
    Same("vae_mini_batch", "data.encoder_batch", "whole"),
    Same("tokenizer_max_length", "family.text_length", "whole"),
    Same("tracker_project_name", "track.project", "text"),
)

_DEAD = "Its own code never reads it."
_HUB = "Weft sends nothing anywhere. Upload the adapter's folder with: hf upload."
_STRATEGY = "It only says which hooks save; what shards is told by the launcher, and here by engine and parallel."

REASONS: Mapping[str, str] = {
    **dict.fromkeys(("cache_dir", "input_perturbation", "max_train_samples", "noise_offset", "prediction_type",
                     "random_flip", "snr_loss", "use_ema", "variant", "revision", "non_ema_revision",
                     "report_model_info"), _DEAD),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token"), _HUB),
    "use_deepspeed": _STRATEGY,
    "use_fsdp": _STRATEGY,
    "save_state": "Each checkpoint holds the state, so that a run goes on exactly.",
    "resume_from_checkpoint": "Its checkpoints are not read. A run of Weft goes on by itself; adapter.start_from takes "
    "one of its .safetensors files, with a fresh optimizer.",
    "logging_dir": "Logs lie in the run's folder.",
    "local_rank": "The launcher says it.",
    "allow_tf32": "Multiplications are in engine.precision, where this has no part.",
    "multi_stream": "Clips are encoded before training, so there is nothing to overlap.",
    "low_vram": "Text encoder and VAE work before training and are then put away. For more see: weft plan --memory "
    "24GiB.",
    "enable_text_encoder_in_dataloader": "Captions are encoded once, before training.",
    "auto_tile_batch_size": "It repeats small clips in a batch; repeats of a source shows them more often, each time "
    "with other noise.",
    "keep_all_node_same_token_length": "Processes may draw different buckets.",
    "train_text_encoder": "Weft trains the transformer alone.",
    "motion_sub_loss": "Weft has no loss of differences between frames.",
    "motion_sub_loss_ratio": "Weft has no loss of differences between frames.",
    "train_sampling_steps": "Times are continuous, not one of so many.",
    "validation_epochs": "Samples are made every so many steps (samples.every).",
    "mode_scale": "It belongs to weighting_scheme mode, which Weft does not have.",
}  # fmt: skip

"""All options of musubi-tuner's trainers for Wan and HunyuanVideo, and why some have no equivalent here."""

from collections.abc import Mapping

from weft.importers.flags import Arity
from weft.importers.values import Same

# Source: musubi_tuner/training/parser_common.py, wan_train_network.py and hv_train_network.py at 30c658c.
_FLAGS = """
    sdpa flash_attn sage_attn xformers flash3 split_attn compile compile_fullgraph cuda_allow_tf32 cuda_cudnn_benchmark
    dynamo_fullgraph dynamo_dynamic persistent_data_loader_workers gradient_checkpointing
    gradient_checkpointing_cpu_offload log_config ddp_gradient_as_bucket_view ddp_static_graph sample_at_first fp8_base
    full_fp16 full_bf16 use_pinned_memory_for_block_swap block_swap_h2d_only img_in_txt_in_offloading
    disable_numpy_memmap preserve_distribution_shape no_metadata dim_from_weights save_state save_state_on_train_end
    save_state_to_huggingface resume_from_huggingface async_upload
    fp8_scaled fp8_t5 vae_cache_cpu one_frame force_v2_1_time_embedding offload_inactive_dit
    fp8_llm vae_tiling
"""
_VALUES = """
    config_file dataset_config compile_backend compile_mode compile_dynamic compile_cache_size_limit dynamo_backend
    dynamo_mode max_train_steps max_train_epochs max_data_loader_n_workers seed gradient_accumulation_steps
    mixed_precision save_precision logging_dir log_with log_prefix log_tracker_name wandb_run_name log_tracker_config
    wandb_api_key ddp_timeout sample_every_n_steps sample_every_n_epochs sample_prompts optimizer_type learning_rate
    max_grad_norm lr_scheduler lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power
    lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_scheduler_type blocks_to_swap block_swap_ring_size flow_shift
    guidance_scale timestep_sampling discrete_flow_shift sigmoid_scale weighting_scheme logit_mean logit_std mode_scale
    min_timestep max_timestep num_timestep_buckets show_timesteps network_weights network_module network_dim
    network_alpha network_dropout training_comment scale_weight_norms output_dir output_name resume
    save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state save_last_n_steps
    save_last_n_steps_state metadata_title metadata_author metadata_description metadata_license metadata_tags
    metadata_reso metadata_arch huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token
    huggingface_repo_visibility dit vae vae_dtype
    task t5 clip dit_high_noise timestep_boundary
    dit_dtype dit_in_channels text_encoder1 text_encoder2 text_encoder_dtype vae_chunk_size
    vae_spatial_tile_sample_min_size
"""
_LISTS = "optimizer_args lr_scheduler_args network_args base_weights base_weights_multiplier"

ARITY: Mapping[str, Arity] = {
    **dict.fromkeys(_FLAGS.split(), "flag"),
    **dict.fromkeys(_VALUES.split(), "one"),
    **dict.fromkeys(_LISTS.split(), "many"),
}

SAME = (
    Same("output_dir", "output", "text", "the run's folder is output/name"),
    Same("seed", "seed", "whole", "numbers are drawn in another order, so not the same noise"),
    Same("gradient_accumulation_steps", "schedule.accumulate", "whole"),
    Same("max_grad_norm", "schedule.max_norm", "number"),
    Same("sample_every_n_steps", "samples.every", "whole"),
    Same("log_tracker_name", "track.project", "text"),
    Same("num_timestep_buckets", "objective.strata", "whole", "counts draws in a row, not those of an epoch"),
)

_COMPILE = "Weft compiles nothing; its blocks run as they are."
_HUB = "Weft sends nothing anywhere. Upload the adapter's folder with: hf upload."
_METADATA = "A header says how the adapter was made; weft export writes modelspec keys from it."
_STATE = "Each checkpoint holds the state and the adapter; save.keep counts them."
_VAE_PARTS = "Weft's own tiling is family.vae_tiling."
_DDP = "Weft averages gradients itself."

REASONS: Mapping[str, str] = {
    "sdpa": "It is torch's own attention, which family.attention: auto takes as well.",
    "xformers": "Weft has no xformers; torch's own attention is as fast.",
    "sage_attn": "musubi itself refuses it in training.",
    "split_attn": "Texts of unequal length are padded as the model was trained with them.",
    **dict.fromkeys(("compile", "compile_backend", "compile_mode", "compile_dynamic", "compile_fullgraph",
                     "compile_cache_size_limit", "dynamo_backend", "dynamo_mode", "dynamo_fullgraph",
                     "dynamo_dynamic"), _COMPILE),
    "cuda_allow_tf32": "Multiplications are in engine.precision, where this has no part.",
    "cuda_cudnn_benchmark": "It speeds up convolutions, which only the autoencoder has.",
    "persistent_data_loader_workers": "Clips are decoded by threads, which stay.",
    "save_precision": "Adapters are saved in fp32; weft export --dtype bf16 writes smaller ones.",
    "logging_dir": "Logs lie in the run's folder.",
    "log_prefix": "Logs lie in the run's folder.",
    "wandb_run_name": "A run is called by its name.",
    "log_tracker_config": "A tracker's further settings are its own environment variables.",
    "wandb_api_key": "Weft keeps no keys. Write it once with: wandb login.",
    "log_config": "The resolved config always lies in the run's folder, and in the adapter's header.",
    "ddp_timeout": "Its unit is minutes, and so is engine.timeout's, which is 30.",
    **dict.fromkeys(("ddp_gradient_as_bucket_view", "ddp_static_graph"), _DDP),
    "sample_at_first": "Videos of the base alone are made once, before training (samples.baseline).",
    "sample_every_n_epochs": "Samples are made every so many steps (samples.every).",
    "lr_decay_steps": "The rate falls until the last step.",
    "lr_scheduler_timescale": "It belongs to inverse_sqrt, which Weft does not have.",
    "lr_scheduler_type": "Curves of other packages are not loaded; there are constant, linear and cosine.",
    "lr_scheduler_args": "Curves of other packages are not loaded; there are constant, linear and cosine.",
    "full_fp16": "musubi switches it off itself; adapters are trained in fp32.",
    "full_bf16": "musubi switches it off itself; adapters are trained in fp32.",
    "block_swap_h2d_only": "Weft's streamed blocks are never copied back: the base is frozen.",
    "block_swap_ring_size": "Streamed blocks pass through two places.",
    "img_in_txt_in_offloading": "Only blocks are streamed.",
    "disable_numpy_memmap": "Weights are read tensor by tensor.",
    "flow_shift": "Samples take the model's own shift (family.shift).",
    "mode_scale": "It belongs to weighting_scheme mode, which Weft does not have.",
    "show_timesteps": "musubi plots and exits. weft plan shows what a run trains on.",
    "no_metadata": "Weft always writes how an adapter was made, and its alpha with it.",
    "dim_from_weights": "It does not work in musubi. adapter.rank must be the rank of adapter.start_from.",
    "training_comment": "There is no place for a comment but the YAML itself.",
    "resume": "musubi's states are not read. adapter.start_from goes on from the adapter, with a fresh optimizer.",
    "resume_from_huggingface": "Nothing is fetched while training.",
    "save_state": _STATE,
    "save_state_on_train_end": _STATE,
    "save_last_n_epochs_state": _STATE,
    "save_last_n_steps_state": _STATE,
    "save_state_to_huggingface": _HUB,
    "async_upload": _HUB,
    **dict.fromkeys(("huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token",
                     "huggingface_repo_visibility"), _HUB),
    **dict.fromkeys(("metadata_title", "metadata_author", "metadata_description", "metadata_license", "metadata_tags",
                     "metadata_reso", "metadata_arch"), _METADATA),
    "vae_dtype": "The autoencoder runs in the precision that it needs.",
    "vae_cache_cpu": "family.vae_tiling saves memory in its place.",
    "vae_chunk_size": _VAE_PARTS,
    "vae_spatial_tile_sample_min_size": _VAE_PARTS,
    "fp8_t5": "The text encoder runs once, before training, and is then put away.",
    "fp8_llm": "The text encoder runs once, before training, and is then put away.",
    "text_encoder_dtype": "The text encoder runs once, before training, and is then put away.",
    "dit_dtype": "family.dtype: auto takes the precision of the run.",
    "force_v2_1_time_embedding": "Times are embedded once for each clip wherever the model allows it.",
    "config_file": "It was read, and is a part of this.",
}  # fmt: skip

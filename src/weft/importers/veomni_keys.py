"""What VeOmni's files may say: their older names, and their keys without an equivalent here, with the reason."""

from collections.abc import Mapping

SECTIONS = ("model", "data", "train")
WHOLE = (
    "model.model_config", "model.foundation", "model.encoders", "model.decoders", "model.condition_model_cfg",
    "model.lora_config.rank_pattern", "model.lora_config.alpha_pattern",
)  # fmt: skip

# veomni/utils/arguments.py of its first year -> veomni/arguments/arguments_types.py of today.
OLDER: Mapping[str, str] = {
    "model.attn_implementation": "model.ops_implementation.attn_implementation",
    "model.moe_implementation": "model.ops_implementation.moe_implementation",
    "model.lora_rank": "model.lora_config.rank",
    "model.lora_alpha": "model.lora_config.alpha",
    "model.lora_target_modules": "model.lora_config.lora_modules",
    "data.dataloader_type": "data.dataloader.type",
    "data.num_workers": "data.dataloader.num_workers",
    "data.prefetch_factor": "data.dataloader.prefetch_factor",
    "data.drop_last": "data.dataloader.drop_last",
    "data.pin_memory": "data.dataloader.pin_memory",
    "train.output_dir": "train.checkpoint.output_dir",
    "train.ckpt_manager": "train.checkpoint.manager",
    "train.save_async": "train.checkpoint.save_async",
    "train.load_checkpoint_path": "train.checkpoint.load_path",
    "train.save_steps": "train.checkpoint.save_steps",
    "train.save_epochs": "train.checkpoint.save_epochs",
    "train.hf_save_steps": "train.checkpoint.hf_save_steps",
    "train.hf_save_epochs": "train.checkpoint.hf_save_epochs",
    "train.save_hf_weights": "train.checkpoint.save_hf_weights",
    "train.optimizer": "train.optimizer.type",
    **{f"train.{key}": f"train.optimizer.{key}" for key in (
        "lr", "lr_min", "lr_start", "lr_warmup_ratio", "lr_decay_style", "lr_decay_ratio", "weight_decay",
        "no_decay_modules", "no_decay_params", "max_grad_norm")},
    "train.enable_mixed_precision": "train.accelerator.fsdp_config.mixed_precision.enable",
    "train.enable_gradient_checkpointing": "train.gradient_checkpointing.enable",
    "train.enable_reentrant": "train.gradient_checkpointing.enable_reentrant",
    "train.enable_full_shard": "train.accelerator.fsdp_config.reshard_after_forward",
    "train.enable_forward_prefetch": "train.accelerator.fsdp_config.forward_prefetch",
    "train.enable_fsdp_offload": "train.accelerator.fsdp_config.offload",
    "train.enable_activation_offload": "train.accelerator.offload.enable_activation",
    "train.accelerator.offload_config.enable_activation": "train.accelerator.offload.enable_activation",
    "train.accelerator.offload_config.activation_gpu_limit": "train.accelerator.offload.activation_gpu_limit",
    "train.activation_gpu_limit": "train.accelerator.offload.activation_gpu_limit",
    "train.data_parallel_mode": "train.accelerator.fsdp_config.fsdp_mode",
    "train.data_parallel_replicate_size": "train.accelerator.dp_replicate_size",
    "train.data_parallel_shard_size": "train.accelerator.dp_shard_size",
    "train.tensor_parallel_size": "train.accelerator.tp_size",
    "train.expert_parallel_size": "train.accelerator.ep_size",
    "train.pipeline_parallel_size": "train.accelerator.pp_size",
    "train.ulysses_parallel_size": "train.accelerator.ulysses_size",
    "train.context_parallel_size": "train.accelerator.cp_size",
    "train.async_enabled": "train.accelerator.enable_async",
    "train.use_wandb": "train.wandb.enable",
    "train.wandb_project": "train.wandb.project",
    "train.wandb_name": "train.wandb.name",
    "train.enable_profiling": "train.profile.enable",
    "train.dyn_bsz_buffer_size": "data.dyn_bsz_buffer_size",
}  # fmt: skip

PACKED = "Weft packs rows of data.length tokens whose texts do not see each other: data.pack."
PROFILED = "Weft always keeps each phase's time, in the run's metrics."
META = "Weft builds spread weights without memory and fills each process's part, whatever is said."
OTHERS = "Weft trains text alone, or Wan and HunyuanVideo."
EXPERTS = "Weft has no layers of its own for mixtures of experts."
LOADING = "Weft reads ahead by threads and processes of its own: data.workers."
SHARED = "FSDP2 decides it here."
MEMORY = "Weft frees memory by itself."
ARTEFACTS = "Weft writes both with each checkpoint: the state to go on from, and the adapter."


def _each(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


REASONS: Mapping[str, str] = {
    "model.config_path": "Weft takes the config that lies with the weights.",
    "model.tokenizer_path": "Weft takes the tokenizer that lies with the model.",
    "model.safetensor_idx_path": "Weft takes the index that lies with the weights.",
    "model.model_config": "Weft takes the config that lies with the weights.",
    "model.condition_model_cfg": "Weft takes the configs that lie with the encoders.",
    **_each("model.foundation model.encoders model.decoders model.input_encoder model.output_encoder "
            "model.encode_target", OTHERS),
    "model.basic_modules": SHARED,
    "model.lora_config.bias": "Weft's LoRA trains no biases.",
    "model.lora_config.rank_pattern": "Weft has one rank for all layers.",
    "model.lora_config.alpha_pattern": "Weft has one alpha for all layers.",
    "model.lora_config.init_lora_weights": "Weft's LoRA begins without a change: A random, B zero.",
    "model.lora_config.modules_to_save": "Weft trains adapters alone.",
    **_each("model.lora_config.target_parameters model.lora_config.share_expert_lora", EXPERTS),
    "model.lora_config.is_trainable": "Weft trains what it starts from.",
    "model.lora_config.task_type": "Weft writes it as PEFT has it.",
    "model.lora_config.base_model_name_or_path": "Weft writes it as PEFT has it.",
    **_each("model.ops_implementation.moe_implementation model.ops_implementation.load_balancing_loss_implementation",
            EXPERTS),
    **_each("model.ops_implementation.rotary_pos_emb_vision_implementation "
            "model.ops_implementation.rms_norm_gated_implementation "
            "model.ops_implementation.causal_conv1d_implementation "
            "model.ops_implementation.chunk_gated_delta_rule_implementation "
            "model.ops_implementation.dsa_indexer_implementation "
            "model.ops_implementation.dsa_attention_implementation model.ops_implementation.mhc_implementation",
            "Weft has kernels for attention, cross-entropy, norm, MLP and rotary: family.kernels."),
    "data.train_sample": "Weft counts the rows.",
    "data.multisource_datasets_type": "Weft mixes sources by their repeats.",
    "data.source_name": "Weft names a source by its path.",
    "data.chat_template": "Weft takes the template of the model's tokenizer; data.template names another file.",
    "data.dyn_bsz_buffer_size": "Weft packs what it has read: data.shuffle_buffer, of streams.",
    "data.silent_exception": "Weft counts what it cannot read and stops at data.unreadable.",
    **_each("data.dataloader.type data.dataloader.num_workers data.dataloader.worker_num_threads "
            "data.dataloader.prefetch_factor data.dataloader.persistent_workers data.dataloader.in_order "
            "data.dataloader.drop_last data.dataloader.pin_memory data.dataloader.use_background_prefetcher "
            "data.predownload_factor data.shuffle_shard_nums data.split_nums data.drop_resume_buffer "
            "data.enable_multisource data.data_tag data.image_keys", LOADING),
    "data.offline_embedding_save_dir": "Weft encodes clips into its own cache: data.cache_folder.",
    **_each("data.mm_configs.frame_factor data.mm_configs.frame_factor_remainder data.mm_configs.scale_factor",
            "Frames of the form 4k+1 and sides of the model's grid follow from the model."),
    **_each("train.dyn_bsz_margin train.dyn_bsz_runtime train.dyn_bsz_count_mode "
            "train.dyn_bsz_physical_overflow_ratio train.pad_to_length", PACKED),
    **_each("train.bsz_warmup_ratio train.bsz_warmup_init_mbtoken", "Weft's batch has one size from the first step."),
    "train.init_device": META,
    "train.ep_sharded_stream_load": EXPERTS,
    "train.moe_load_balance_monitor_interval": EXPERTS,
    "train.enable_full_determinism": "Weft's order and noise follow from the seed; kernels are torch's own.",
    "train.enable_batch_invariant_mode": "Weft's order and noise follow from the seed; kernels are torch's own.",
    **_each("train.empty_cache_steps train.gc_steps train.sync_each_train_step", MEMORY),
    "train.eval_epochs": "Weft measures after steps: validation.every.",
    "train.ops_to_save": "Weft recomputes whole blocks: engine.recompute.",
    "train.vit_lr": OTHERS,
    "train.checkpoint.manager": "Weft's sharded checkpoints are PyTorch DCP.",
    **_each("train.checkpoint.save_hf_weights train.checkpoint.hf_save_steps train.checkpoint.hf_save_epochs",
            ARTEFACTS),
    "train.checkpoint.dcp_save_to_lowest_rank": ARTEFACTS,
    **_each("train.optimizer.no_decay_modules train.optimizer.no_decay_params",
            "Weft's adapters are matrices, which all decay alike."),
    "train.optimizer.lr_start": "Weft's warm-up begins at 0.",
    "train.accelerator.fsdp_config.reshard_after_forward": SHARED,
    "train.accelerator.fsdp_config.reshard_after_backward": SHARED,
    "train.accelerator.fsdp_config.forward_prefetch": SHARED,
    "train.accelerator.fsdp_config.max_load_broadcast_size": SHARED,
    **_each("train.accelerator.fsdp_config.mixed_precision.reduce_dtype "
            "train.accelerator.fsdp_config.mixed_precision.output_dtype "
            "train.accelerator.fsdp_config.mixed_precision.cast_forward_inputs",
            "Weft's adapters and their gradients are fp32."),
    "train.accelerator.fsdp_config.offload": "Weft keeps frozen weights in host memory by engine.stream_blocks.",
    "train.accelerator.offload.activation_gpu_limit": "engine.offload_inputs moves all inputs of blocks.",
    **_each("train.accelerator.ep_outside train.accelerator.extra_parallel_sizes "
            "train.accelerator.extra_parallel_placement_innermost train.accelerator.extra_parallel_names", EXPERTS),
    "train.accelerator.enable_async": "Weft's exchange is not hidden behind other work.",
    "train.gradient_checkpointing.debug": PROFILED,
    "train.gradient_checkpointing.enable_reentrant": "Weft's recomputing needs no reentrant way.",
    "train.gradient_checkpointing.early_stop": "It is torch's own way, and always so here.",
    **_each("train.torch_compile.enable train.torch_compile.backend train.torch_compile.mode "
            "train.torch_compile.fullgraph train.torch_compile.dynamic train.enable_compile",
            "Weft does not compile the network."),
    **_each("train.chunk_mbs_config.enable train.chunk_mbs_config.chunk_mbs", PACKED),
    "train.wandb.name": "Trackers get the run's name.",
    "train.wandb.id": "Weft goes on with a run of its own folder.",
    **_each("train.profile.enable train.profile.start_step train.profile.end_step train.profile.trace_dir "
            "train.profile.record_shapes train.profile.profile_memory train.profile.with_stack "
            "train.profile.with_modules train.profile.rank0_only train.profile_start_step train.profile_end_step "
            "train.profile_trace_dir train.profile_record_shapes train.profile_profile_memory "
            "train.profile_with_stack train.profile_rank0_only", PROFILED),
    **_each("train.channel_loss.enable train.channel_loss.interval", "Weft keeps one loss for all sources."),
}  # fmt: skip

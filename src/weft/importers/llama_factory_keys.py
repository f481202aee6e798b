"""What LLaMA-Factory's files may say: its keys without an equivalent here, with the reason, and all that it knows."""

from collections.abc import Mapping

SECRETS = ("hf_hub_token", "ms_hub_token", "om_hub_token", "swanlab_api_key", "hub_token")
REFUSED_STAGES: Mapping[str, str] = {
    "dpo": "preferences (DPO)",
    "kto": "preferences (KTO)",
    "rm": "a reward model",
    "ppo": "rewards (PPO)",
}

PREFERENCES = "It is of training on preferences and rewards, which Weft does not have yet."
PICTURES = "Weft's language models take text alone."
INFERENCE = "It is of inference. Weft samples while it trains: samples.prompts."
EXPORTING = "Weft writes PEFT's format; 'weft export' and 'weft merge' write the others."
PROGRESS = "Weft keeps every step, and the dashboard draws it."
TOKENS = "Weft adds no tokens: the tokenizer and the embeddings stay as they are."
TEMPLATE = "Weft takes the chat template of the model's own tokenizer; data.template names another file."
TRICKS = "Weft's loss is the cross-entropy of the learned tokens, each counted alike."
OPTIMIZED = "Weft takes AdamW, its 8-bit form, or any class by its path: optimizer.path."
WHOLE_ONLY = "It is of training the whole network, and Weft trains adapters."
LOADING = "Weft reads ahead by threads and processes of its own: data.workers."
HUB = "Weft uploads nothing, and reads models from folders."
LAUNCH = "weft train starts the processes: --gpus, or torchrun and accelerate."
MEASURED = "Weft measures the loss on what is held out: validation."
COMPILE = "Weft does not compile the network."
PROFILED = "Weft always keeps each phase's time, in the run's metrics."


def _each(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


REASONS: Mapping[str, str] = {
    **_each("template tool_format enable_thinking preserve_thinking", TEMPLATE),
    **_each("use_fast_tokenizer resize_vocab split_special_tokens add_tokens add_special_tokens "
            "new_special_tokens_config init_special_tokens additional_target", TOKENS),
    **_each("cache_dir model_revision hf_hub_token ms_hub_token om_hub_token push_to_hub hub_model_id hub_strategy "
            "hub_token hub_private_repo hub_always_push hub_revision", HUB),
    "trust_remote_code": "Weft runs a model's own code only if you write family.trust_remote_code: true; models that "
                         "transformers has need none.",
    **_each("low_cpu_mem_usage offload_folder device_map quantization_device_map", "Weft builds the network without "
            "memory and fills it from the files."),
    "rope_scaling": "Weft takes the rotary embedding of the model's own config.",
    **_each("shift_attn mixture_of_depths", "Weft's attention is the model's own."),
    **_each("use_unsloth use_v1_kernels use_kt kt_cpu_activation kt_weight_path", "Weft's kernels: family.kernels."),
    **_each("upcast_layernorm upcast_lmhead_output", "Weft computes norms and the loss in fp32."),
    "use_reentrant_gc": "Weft's recomputing needs no reentrant way.",
    "moe_aux_loss_coef": TRICKS,
    "train_from_scratch": "Weft trains adapters on weights that are there.",
    **_each("infer_backend infer_dtype use_kv_cache vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank "
            "vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend "
            "predict_with_generate generation_max_length generation_num_beams do_sample temperature top_p top_k "
            "num_beams max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens do_predict "
            "eval_num_beams", INFERENCE),
    "print_param_status": "'weft plan' lists what is trained.",
    "quantization_method": "Weft's own fp8, int8 and nf4: family.dtype.",
    "quantization_type": "Weft's four bits are nf4.",
    "double_quantization": "Weft's nf4 keeps its scales plain.",
    **_each("image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels "
            "video_fps video_maxlen use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower "
            "freeze_multi_modal_projector freeze_language_model", PICTURES),
    **_each("export_dir export_size export_device export_quantization_bit export_quantization_dataset "
            "export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id",
            EXPORTING),
    **_each("mix_strategy interleave_probs", "Weft mixes sources by their repeats."),
    **_each("overwrite_cache tokenized_path data_shared_file_system preprocessing_batch_size",
            "Weft's cache finds out by itself what is stale: data.cache_folder."),
    **_each("dataloader_num_workers dataloader_pin_memory dataloader_drop_last dataloader_persistent_workers "
            "dataloader_prefetch_factor", LOADING),
    **_each("ignore_pad_token_for_loss", "Padding is never learned here."),
    **_each("eval_on_each_dataset per_device_eval_batch_size eval_accumulation_steps eval_delay eval_on_start "
            "compute_accuracy do_eval metric_for_best_model greater_is_better prediction_loss_only", MEASURED),
    "load_best_model_at_end": "Weft keeps the best checkpoints by save.keep_best.",
    "early_stopping_steps": "Weft trains to the end of its schedule, and keeps the best by save.keep_best.",
    "loraplus_lr_embedding": "Weft's LoRA has no embeddings in it.",
    "pissa_convert": "Weft writes PiSSA's adapters so that they fit the base as it is.",
    "create_new_adapter": "Merge the first adapter into the base: weft merge ADAPTER --into BASE.",
    "adapter_folder": "Name the adapter's folder itself: adapter.start_from.",
    "oft_rank": "Weft's OFT is told the size of its blocks.",
    "module_dropout": "Weft's OFT has no dropout.",
    **_each("freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro use_galore "
            "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise "
            "use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
            "apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block "
            "badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose pure_bf16",
            WHOLE_ONLY),
    **_each("pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight "
            "simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model "
            "ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters "
            "reward_model_quantization_bit reward_model_type ld_alpha", PREFERENCES),
    **_each("use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha label_smoothing_factor "
            "neftune_noise_alpha", TRICKS),
    **_each("use_adam_mini use_muon optim_args optim_target_modules lr_scheduler_kwargs", OPTIMIZED),
    **_each("use_mca use_megatron_bridge megatron_bridge_args use_hyper_parallel hyper_parallel_args "
            "hyper_parallel_cp_size ray_num_workers ray_init_kwargs ray_run_name ray_storage_path "
            "ray_storage_filesystem resources_per_worker placement_strategy master_addr master_port ddp_timeout "
            "ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_static_graph ddp_broadcast_buffers "
            "local_rank accelerator_config parallelism_config fsdp_config", LAUNCH),
    **_each("fp8 fp8_backend fp8_enable_fsdp_float8_all_gather", "Weft's fp8 is of the frozen weights: family.dtype."),
    **_each("plot_loss logging_steps logging_strategy logging_first_step logging_dir logging_nan_inf_filter log_level "
            "log_level_replica log_on_each_node disable_tqdm include_num_input_tokens_seen include_tokens_per_second "
            "include_effective_tokens_per_second skip_memory_metrics debug", PROGRESS),
    **_each("use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key "
            "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
            "Weft reports to TensorBoard, wandb and trackio: track."),
    **_each("run_name trackio_space_id", "Trackers get the run's name."),
    "overwrite_output_dir": "Weft goes on where the run's folder has a checkpoint, and writes over nothing else.",
    "save_only_model": "Weft's checkpoints hold all that a run needs to go on.",
    "save_on_each_node": "Weft writes each file once.",
    "save_safetensors": "Weft writes safetensors alone.",
    **_each("ignore_data_skip restore_callback_states_from_checkpoint", "Weft goes on at the very row."),
    "data_seed": "One seed decides all: seed.",
    "full_determinism": "Weft's order and noise follow from the seed; kernels are torch's own.",
    **_each("torch_compile torch_compile_backend torch_compile_mode", COMPILE),
    "tf32": "Weft leaves torch's own choice.",
    **_each("auto_find_batch_size group_by_length length_column_name train_sampling_strategy "
            "average_tokens_across_devices",
            "Weft packs rows, and counts each learned token alike over all processes."),
    **_each("enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps "
            "profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules",
            PROFILED),
    **_each("remove_unused_columns label_names torch_empty_cache_steps use_cpu no_cuda use_cache bf16_full_eval "
            "fp16_full_eval", "Weft decides it by itself."),
    "do_train": "weft train trains.",
}  # fmt: skip

"""What ai-toolkit's files may say: its model names, and its keys without an equivalent here, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass

TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
SECTIONS = ("network", "save", "train", "model", "sample", "logging", "first_sample")
WHOLE = (
    "train.optimizer_params", "train.lr_scheduler_params", "train.validation_config", "model.quantize_kwargs",
    "model.model_paths", "network.lorm", "first_sample", "guidance", "adapter", "embedding", "decorator", "slider",
)  # fmt: skip


@dataclass(frozen=True)
class Arch:
    """A model as ai-toolkit trains it. shift: of its training scheduler. blocks: None: the size decides."""

    kind: str = "wan"
    two: bool = False
    image: bool = False  # samples go on from an image
    shift: float = 3.0
    blocks: int | None = None


# toolkit/models/wan21 and extensions_built_in/diffusion_models/wan22: their `arch` and scheduler_config.
ARCHS: Mapping[str, Arch] = {
    "wan21": Arch(),
    "wan21_i2v": Arch(image=True, blocks=40),
    "wan22_14b": Arch(two=True, shift=5.0, blocks=40),
    "wan22_14b_i2v": Arch(two=True, image=True, shift=5.0, blocks=40),
    "wan22_5b": Arch(shift=5.0, blocks=30),
}
ALL_ARCHS = (
    *ARCHS, "ace_step_15", "anima", "boogu_image", "chroma", "chroma_radiance", "cogview4", "ernie_image", "f-lite",
    "flex1", "flex2", "flux", "flux2", "flux2_klein_4b", "flux2_klein_9b", "flux_kontext", "hidream", "hidream_e1",
    "hidream_o1", "ideogram4", "krea2", "ltx2", "ltx2.3", "ltx2.5", "lumina2", "mageflow", "minimax_h3",
    "nucleus_image", "omnigen2", "pixart", "prx_pixel", "qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "sd1",
    "sd2", "sd3", "sdxl", "zeta_chroma", "zimage", "zimage_l2p",
)  # fmt: skip

OF_UI = "It belongs to ai-toolkit's page and queue. Weft's is 'weft dashboard'."
OF_IMAGES = "It belongs to image models."
OTHER_LOSS = "Weft's loss is the mean squared error of the velocity, and nothing is added to it."
OTHER_NOISE = "Weft's noise is plain Gaussian noise, of the strength that the time says."
NO_AUGMENTING = "Weft encodes each clip once, without random changes to its picture."
PICTURE_ONLY = "Weft trains on clips and captions alone, without control pictures or masks."
CACHED = "Weft encodes clips and captions once, keeps them on disk, and then frees the encoders: data.cache."
NO_MERGED = "Weft trains on the base as it is. Merge the LoRA first: weft merge ADAPTER --into BASE."
OTHERS_TRAIN = "Weft trains the transformer alone."
COMPILE = "Weft does not compile the network."
MEMORY = "Weft finds room by itself; 'weft plan' shows what the run needs and what would make it less."
PLACES = "Weft takes the device from engine.device, and frees the encoders once all is encoded."


def _each(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


REASONS: Mapping[str, str] = {
    **_each("sqlite_db_path is_ui_job uid log_dir", OF_UI),
    **_each("performance_log_every torch_profiler", "Weft always keeps each phase's time, in the run's metrics."),
    **_each("first_sample", "Weft samples the base once before the first step, with the run's own prompts."),
    **_each("guidance adapter embedding decorator slider do_lorm lorm_extract_mode", OTHERS_TRAIN),
    "network.lorm": "Weft extracts adapters by 'weft extract'.",
    "network.conv": "The blocks of these models have no convolutions, so it did nothing.",
    "network.conv_alpha": "The blocks of these models have no convolutions, so it did nothing.",
    "network.transformer_only": "Weft's targets lie in the blocks; name others under adapter.targets.",
    "network.split_multistage_loras": "Weft always writes one adapter for each network, named high and low.",
    "network.layer_offloading": "It did not work there either, by its own remark.",
    "network.old_lokr_format": "Weft writes LoKr as PEFT and ComfyUI read it: weft export.",
    "network.all_layers": "Weft adapts linear layers.",
    "network.full_if_contains": "Weft's adapters of one run are of one kind.",
    "save.dtype": "Weft saves adapters in fp32; 'weft convert' writes bf16 or fp16.",
    "save.save_format": "Weft writes PEFT's and diffusers' format; 'weft export' writes the others.",
    **_each("save.push_to_hub save.hf_repo_id save.hf_private", "Weft uploads nothing."),
    "logging.log_every": "Weft keeps every step.",
    "logging.verbose": "Weft keeps every step.",
    "logging.use_ui_logger": OF_UI,
    "logging.run_name": "Trackers get the run's name.",
    **_each("train.train_text_encoder train.text_encoder_lr train.embedding_lr train.adapter_lr train.refiner_lr "
            "train.train_refiner train.train_turbo train.show_turbo_outputs train.bypass_guidance_embedding",
            OTHERS_TRAIN),
    **_each("train.noise_offset train.noise_multiplier train.target_noise_multiplier train.random_noise_multiplier "
            "train.random_noise_shift train.dynamic_noise_offset train.match_noise_norm train.force_consistent_noise "
            "train.blended_blur_noise train.optimal_noise_pairing_samples train.do_signal_correction_noise "
            "train.signal_correction_noise_scale train.do_batch_noise_correction train.batch_noise_correction_scale "
            "train.do_signal_amplification train.signal_amplification_strength train.img_multiplier "
            "train.noisy_latent_multiplier train.latent_multiplier train.standardize_images train.standardize_latents "
            "train.adaptive_scaling_factor train.num_train_timesteps train.next_sample_timesteps", OTHER_NOISE),
    **_each("train.min_snr_gamma train.snr_gamma train.learnable_snr_gos train.loss_target train.inverted_mask_prior "
            "train.inverted_mask_prior_multiplier train.diff_output_preservation "
            "train.diff_output_preservation_multiplier train.diff_output_preservation_class "
            "train.blank_prompt_preservation train.blank_prompt_preservation_multiplier train.do_cfg "
            "train.do_random_cfg train.cfg_scale train.max_cfg_scale train.cfg_rescale train.correct_pred_norm "
            "train.correct_pred_norm_multiplier train.t0_loss_target train.t0_velocity_equiv_weight train.do_fft_loss "
            "train.do_fft_velocity_equiv_weight train.pred_scaler train.do_prior_divergence train.target_norm_std "
            "train.target_norm_std_value train.do_guidance_loss train.guidance_loss_target "
            "train.do_guidance_loss_cfg_zero train.guidance_loss_schedule train.unconditional_prompt "
            "train.do_differential_guidance train.differential_guidance_scale train.do_blank_stabilization "
            "train.reg_weight train.negative_prompt train.max_negative_prompts train.max_loss train.max_loss_debug "
            "train.latent_feature_extractor_path train.latent_feature_loss_weight "
            "train.diffusion_feature_extractor_path train.diffusion_feature_extractor_weight "
            "train.linear_timesteps train.linear_timesteps2 train.audio_loss_multiplier", OTHER_LOSS),
    **_each("train.adapter_assist_name_or_path train.adapter_assist_type train.match_adapter_assist "
            "train.match_adapter_chance train.free_u train.short_and_long_captions "
            "train.short_and_long_captions_encoder_split train.prompt_saturation_chance", OF_IMAGES),
    **_each("train.single_item_batching train.do_paramiter_swapping train.paramiter_swapping_factor", MEMORY),
    **_each("train.xformers train.sdp", "Weft's attention is family.attention, and torch's own choice by default."),
    "train.weight_jitter": "Weft moves weights by the optimizer alone.",
    "train.merge_network_on_save": "'weft merge' writes a base with the adapter in it.",
    "train.merge_network_on_save_strength": "'weft merge' takes a weight for each adapter.",
    "train.start_step": "Weft goes on from its own checkpoints: resume.",
    "train.force_first_sample": "Weft samples before the first step, once.",
    "train.cache_text_embeddings": CACHED,
    "train.noise_scheduler": "Weft trains these models by flow matching, which it means here.",
    "train.validation_config": "Weft holds clips out of the data and measures them on fixed noise: "
                               "data.validation_items, validation.every.",
    "model.quantize_te": CACHED,
    "model.qtype_te": CACHED,
    "model.text_encoder_bits": CACHED,
    **_each("model.vae_device model.te_device", PLACES),
    **_each("model.vae_dtype model.te_dtype model.dtype", "Weft's encoders run in the precision of the engine."),
    **_each("model.lora_path model.assistant_lora_path model.inference_lora_path model.unconditional_lora_path",
            NO_MERGED),
    "model.accuracy_recovery_adapter": "Weft's nf4 base has no recovery adapter.",
    **_each("model.compile model.block_compile model.compile_mode model.compile_fullgraph model.compile_dynamic "
            "model.cache_size_limit", COMPILE),
    **_each("model.auto_memory model.layer_offloading_text_encoder_percent model.split_model_over_gpus "
            "model.split_model_other_module_param_count_scale model.quantize_kwargs", MEMORY),
    **_each("model.refiner_name_or_path model.refiner_start_at model.unet_path model.unet_sample_size "
            "model.use_text_encoder_1 model.use_text_encoder_2 model.is_v2 model.is_xl model.is_v3 model.is_flux "
            "model.is_pixart model.is_pixart_sigma model.is_auraflow model.is_lumina2 model.is_ssd model.is_vega "
            "model.is_v_pred model.use_flux_cfg model.experimental_xl model.attn_masking model.latent_space_version "
            "model.in_context", OF_IMAGES),
    **_each("model.ignore_if_contains model.only_if_contains",
            "ai-toolkit reads it for older models only; name layers under network.network_kwargs there."),
    "sample.sampler": "Weft samples with the model's own flow sampler.",
    "sample.sample_start_step": "Weft samples from the first multiple of samples.every on.",
    "sample.walk_seed": "Weft gives each prompt noise of its own from the one seed.",
    "sample.fps": "Weft writes samples at the model's own rate.",
    "sample.ext": "Weft writes .mp4 and, of one frame, .png.",
    "sample.format": "Weft writes .mp4 and, of one frame, .png.",
    "sample.network_multiplier": "Weft samples with the adapter as it is trained.",
    **_each("sample.guidance_rescale sample.adapter_conditioning_scale sample.refiner_start_at sample.extra_values "
            "sample.do_cfg_norm", "Weft's guidance is u + g (c - u), and nothing is rescaled."),
}  # fmt: skip

DATASET_REASONS: Mapping[str, str] = {
    "type": "The ending of each file says whether it is a video or an image.",
    **_each("shuffle_tokens token_dropout_rate keep_tokens replacements random_triggers random_triggers_max "
            "use_short_captions", "Weft trains on each caption as it stands, encoded once."),
    **_each("flip_x flip_y augments augmentations shuffle_augmentations random_scale random_crop square_crop scale "
            "standardize_images replay_transforms", NO_AUGMENTING),
    **_each("control_path control_path_1 control_path_2 control_path_3 control_from_same_folder "
            "num_controls_from_same_folder control_transparent_color inpaint_path full_size_control_images alpha_mask "
            "mask_path invert_mask mask_min_value unconditional_path clip_image_path clip_image_from_same_folder "
            "clip_image_augmentations clip_image_shuffle_augmentations controls guidance_type", PICTURE_ONLY),
    "buckets": "Weft always keeps a clip's own aspect ratio, or give the shapes under data.buckets.sizes.",
    "bucket_tolerance": "Sides are multiples of what the model needs.",
    **_each("is_reg prior_reg network_weight loss_multiplier diff_output_preservation diff_output_preservation_class",
            OTHER_LOSS),
    **_each("cache_latents cache_latents_to_disk cache_tensors_to_disk cache_clip_vision_to_disk cache_text_embeddings "
            "load_image_when_caching_latents", CACHED),
    **_each("num_workers prefetch_factor cache_latents_num_workers", "Weft takes the number of cores: data.workers."),
    "batch_size": "All sources share data.batch_size.",
    "default_caption": "Weft has no caption for clips without one; write the .txt files, or a manifest.",
    **_each("do_audio audio_preserve_pitch audio_normalize", "Weft trains on pictures, without sound."),
    "do_i2v": "Weft gives the first frame where the model takes one: objective.first_frame.",
    **_each("debug fast_image_size extra_values", "Weft looks into each file for its size and frames."),
    "trim_auto_frame_count_tail": "Weft cuts the end, down to whole latent frames.",
    "poi": "It is of an older ai-toolkit.",
}  # fmt: skip

# HunyuanVideo; the arguments are gathered first
DIT=/models/hunyuan/mp_rank_00_model_states.pt
ARGS=(
  --dit $DIT
  --vae /models/hunyuan/pytorch_model.pt
  --text_encoder1 /models/llava_llama3_fp16.safetensors   # llama
  --text_encoder2 /models/clip_l.safetensors
  --dataset_config dataset.toml
)
ARGS+=(--fp8_base --vae_tiling --vae_chunk_size 32)
accelerate launch --num_cpu_threads_per_process 1 hv_train_network.py "${ARGS[@]}" \
  --sdpa --mixed_precision bf16 --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing \
  --network_module networks.lora --network_dim 32 --network_alpha 1 --guidance_scale 6.0 \
  --timestep_sampling sigmoid --sigmoid_scale 1.5 --blocks_to_swap 20 \
  --max_train_epochs 10 --save_every_n_epochs 1 --output_dir out --output_name hv-style

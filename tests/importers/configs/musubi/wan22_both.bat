@echo off
rem both experts, one LoRA
set "MODELS=D:\models\wan 2.2"
call venv\Scripts\activate
accelerate launch --num_cpu_threads_per_process 1 --mixed_precision fp16 ^
  src\musubi_tuner\wan_train_network.py --task i2v-A14B ^
  --dit "%MODELS%\wan2.2_i2v_low_noise_14B_fp16.safetensors" ^
  --dit_high_noise "%MODELS%\wan2.2_i2v_high_noise_14B_fp16.safetensors" ^
  --timestep_boundary 900 --offload_inactive_dit --dataset_config dataset.toml ^
  --flash_attn --mixed_precision fp16 --blocks_to_swap 20 --use_pinned_memory_for_block_swap ^
  --optimizer_type AdamW --learning_rate 1e-4 --gradient_checkpointing --gradient_checkpointing_cpu_offload ^
  --network_module networks.lora_wan --network_dim 16 --network_alpha 16 ^
  --network_args loraplus_lr_ratio=4 rank_dropout=0.1 verbose=True ^
  --timestep_sampling shift --discrete_flow_shift 5 ^
  --max_train_epochs 16 --save_every_n_epochs 2 --save_last_n_epochs 6 --save_state ^
  --output_dir out --output_name dance_i2v
pause

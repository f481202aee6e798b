#!/usr/bin/env bash
set -euo pipefail
# the high-noise expert alone, as the guide advises
export CUDA_VISIBLE_DEVICES=0,1
MODELS=${MODELS:-/data/models/wan22}
NAME="pottery-high"
SEED='1234'

accelerate launch --num_cpu_threads_per_process 1 --num_processes 2 --multi_gpu --mixed_precision bf16 \
    src/musubi_tuner/wan_train_network.py \
    --task t2v-A14B \
    --dit "$MODELS/wan2.2_t2v_high_noise_14B_fp16.safetensors" \
    --vae "$MODELS/wan_2.1_vae.safetensors" --t5 $MODELS/models_t5_umt5-xxl-enc-bf16.pth \
    --dataset_config dataset.toml --sdpa --mixed_precision bf16 --fp8_base --fp8_scaled \
    --optimizer_type adamw8bit --optimizer_args weight_decay=0.1 "betas=(0.9,0.95)" \
    --learning_rate 2e-4 --lr_scheduler cosine --lr_warmup_steps 5% \
    --gradient_checkpointing --gradient_accumulation_steps=2 --max_grad_norm 1.0 \
    --max_data_loader_n_workers 4 --persistent_data_loader_workers \
    --network_module networks.lora_wan --network_dim 32 --network_alpha 16 --network_dropout 0.05 \
    --timestep_sampling shift --discrete_flow_shift 12.0 \
    --min_timestep 875 --max_timestep 1000 --preserve_distribution_shape \
    --max_train_steps 2000 --save_every_n_steps 500 --save_last_n_steps 1000 --seed $SEED \
    --log_with tensorboard --logging_dir "logs/${NAME}" \
    --output_dir outputs --output_name "$NAME" 2>&1 | tee train.log

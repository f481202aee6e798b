export MASTER_ADDR="10.0.0.1"
export MASTER_PORT=10086
export WORLD_SIZE=2   # machines
export NUM_PROCESS=16 # all of them
export RANK=0         # of this machine

accelerate launch --mixed_precision="bf16" --main_process_ip=$MASTER_ADDR --main_process_port=$MASTER_PORT \
  --num_machines=$WORLD_SIZE --num_processes=$NUM_PROCESS --machine_rank=$RANK scripts/wan2.1/train_lora.py \
  --config_path="config/wan2.1/wan_civitai.yaml" --pretrained_model_name_or_path=models/Wan2.1-T2V-14B \
  --train_data_dir=/data --train_data_meta=/lists/all.csv --video_sample_n_frames=49 --video_sample_size=512 \
  --token_sample_size=512 --video_sample_stride=1 --train_batch_size=1 --random_ratio_crop --enable_bucket \
  --weighting_scheme=logit_normal --logit_std=1.2 --learning_rate=1e-5 --scale_lr --gradient_accumulation_steps=2 \
  --use_came --rank=16 --network_alpha=16 --lora_skip_name=ffn --report_to=wandb --tracker_project_name=wan \
  --max_train_steps=400 --lr_scheduler=linear --output_dir=out

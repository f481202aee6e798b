export MODEL_NAME="models/Diffusion_Transformer/Wan2.2-I2V-A14B"
export DATASET_NAME="datasets/mine/"
export DATASET_META_NAME="datasets/mine/metadata.json"
# NCCL_P2P_DISABLE=1 is for machines without RDMA
# export NCCL_P2P_DISABLE=1
NCCL_DEBUG=INFO

accelerate launch --mixed_precision="bf16" scripts/wan2.2/train_lora.py \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --train_data_dir=$DATASET_NAME \
  --train_data_meta=$DATASET_META_NAME \
  --config_path="config/wan2.2/wan_civitai_i2v.yaml" \
  --image_sample_size=1024 \
  --video_sample_size=256 \
  --token_sample_size=512 \
  --video_sample_stride=1 \
  --video_sample_n_frames=49 \
  --train_batch_size=2 \
  --video_repeat=4 \
  --max_train_steps=3000 \
  --checkpointing_steps=500 \
  --checkpoints_total_limit=4 \
  --learning_rate=1e-04 \
  --lr_scheduler=cosine \
  --lr_warmup_steps=100 \
  --output_dir="i2v_high" \
  --seed=42 \
  --gradient_checkpointing \
  --mixed_precision="bf16" \
  --adam_weight_decay=3e-2 \
  --adam_epsilon=1e-10 \
  --vae_mini_batch=1 \
  --max_grad_norm=0.05 \
  --random_hw_adapt \
  --training_with_video_token_length \
  --enable_bucket \
  --random_frame_crop \
  --uniform_sampling \
  --boundary_type="high" \
  --rank=64 \
  --network_alpha=32 \
  --target_name="q,k,v,ffn.0,ffn.2" \
  --use_peft_lora \
  --train_mode="i2v" \
  --validation_prompts "a cat wakes" "a dog runs" \
  --validation_paths cat.png dog.png \
  --validation_steps=500 \
  --resume_from_checkpoint=latest

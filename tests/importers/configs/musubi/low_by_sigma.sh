accelerate launch src/musubi_tuner/wan_train_network.py --task t2v-A14B --dit low/model.safetensors \
  --dataset_config dataset.toml --network_module networks.lora_wan --network_dim 16 --network_alpha 16 \
  --learning_rate 1e-4 --optimizer_type AdamW --min_timestep 0 --max_timestep 875 --weighting_scheme logit_normal \
  --logit_mean 0.5 --max_train_steps 100 --lr_warmup_steps 200 --lr_scheduler linear --output_name low

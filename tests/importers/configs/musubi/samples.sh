accelerate launch src/musubi_tuner/wan_train_network.py --task t2v-14B --dit model.safetensors \
  --dataset_config dataset.toml --network_module networks.lora_wan --network_dim 16 --network_alpha 16 \
  --optimizer_type adamw --learning_rate 1e-4 --timestep_sampling shift --discrete_flow_shift 5 \
  --sample_prompts prompts.txt --sample_every_n_steps 200 --sample_every_n_epochs 1 --sample_at_first \
  --max_train_steps 1000 --output_name pots

python wan_train_network.py --task t2v-A14B --dit high.safetensors --network_module networks.lora_wan \
  --network_dim 16 --network_alpha 16 \
  --min_timestep 1000 --max_timestep 875

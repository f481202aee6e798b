python wan_train_network.py --dit a.safetensors --network_module networks.lora_wan --network_dim 16 \
  --output_name "run-$(date +%Y%m%d)"

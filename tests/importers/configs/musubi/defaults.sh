python src/musubi_tuner/wan_train_network.py --dit wan2.1_t2v_14B_bf16.safetensors --dataset_config dataset.toml \
  --network_module networks.lora_wan --network_dim 32 --discrete_flow_shift 3

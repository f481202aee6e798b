python wan_train_network.py --task flf2v-14B --dit a.safetensors --network_dim 4

accelerate launch src/musubi_tuner/flux_kontext_train_network.py --dit a --network_dim 4

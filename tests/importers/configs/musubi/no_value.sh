python wan_train_network.py --dit --network_dim 4

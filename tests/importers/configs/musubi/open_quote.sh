python wan_train_network.py --dit a \
  --output_name "never closed

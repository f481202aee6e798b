# a LoKr, started from PowerShell
$dit = "C:\models\wan2.1_t2v_1.3B_bf16.safetensors"
accelerate launch --mixed_precision bf16 src/musubi_tuner/wan_train_network.py `
  --task t2v-1.3B --dit $dit --dataset_config dataset.toml `
  --network_module networks.lokr --network_dim 8 --network_alpha 4 --network_args factor=8 rank_dropout=0.1 `
  --optimizer_type prodigyopt.Prodigy --optimizer_args weight_decay=0.01 decouple=True d_coef=2.0 `
  --learning_rate 1 --timestep_sampling qwen_shift --max_train_steps 500 --output_name style-lokr

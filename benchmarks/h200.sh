#!/usr/bin/env bash
# Figures of one H200 within ten minutes: bash benchmarks/h200.sh FOLDER. Each suite's JSON is written case by case, so that
# whatever was measured when the time is up stays. The first cases matter most.
set -u
out=${1:?usage: bash benchmarks/h200.sh FOLDER}
mkdir -p "$out"
began=$SECONDS
budget=${2:-570}

# NAME SECONDS ARGUMENTS...: one bench with a limit of its own; what fails is told and the rest goes on.
bench() {
  local name=$1 limit=$2 left=$((budget - (SECONDS - began)))
  shift 2
  ((left > 15)) || { echo "$name: no time left" | tee -a "$out/log.txt"; return; }
  ((limit < left)) || limit=$left
  echo "== $name ($limit s)" | tee -a "$out/log.txt"
  timeout --signal=INT --kill-after=10 "$limit" python -m weft bench "$@" --json "$out/$name.json" 2>&1 | tee -a "$out/log.txt"
}

nvidia-smi --query-gpu=name,driver_version,temperature.gpu,clocks.sm,memory.total --format=csv | tee -a "$out/log.txt"
bench vid480-1.3b 110 --model wan2.1-1.3b --clip 81x480x832 --steps 10
bench images 60 --model wan2.1-1.3b --clip 1x480x832 --steps 20
bench against-images 60 --model wan2.1-1.3b --clip 1x480x832 --steps 12 --against diffusers-peft
bench vid480-14b 100 --model wan2.2-a14b --clip 81x480x832 --blocks 2 --steps 5
bench against-blocks 90 --model wan2.1-1.3b --clip 81x480x832 --blocks 4 --steps 6 --against diffusers-peft
bench qwen3-8b 60 --model qwen3-8b --tokens 4096 --documents 1024 --batch 4 --steps 8
bench compile 70 --model wan2.1-1.3b --clip 81x480x832 --blocks 2 --steps 5 \
  --variants "engine.compile=true; engine.compile=false; engine.compile=false family.lean=false adapter.fused=false"
bench qwen3-0.6b 40 --model qwen3-0.6b --tokens 4096 --documents 1024 --batch 4 --steps 10
bench hunyuan 60 --model hunyuan-video --clip 81x480x832 --blocks 1 --steps 4
bench vid720 60 --model wan2.1-1.3b --clip 81x720x1280 --blocks 2 --steps 3
nvidia-smi --query-gpu=temperature.gpu,clocks.sm,power.draw --format=csv | tee -a "$out/log.txt"

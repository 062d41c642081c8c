#!/usr/bin/env bash
# Speed and memory of a training step, ours and a peer's, alternating in one call; prints a Markdown table.
#
#   scripts/bench.sh cpu        SmolLM2-135M, LoRA r=16 on all linear layers, 2 x 256 tokens, f32, 2 threads,
#                               median of 8 steps after 2, against peft
#
# ROUNDS (3) runs of each program; STEPS (8), WARMUP (2), THREADS (2); MODEL (models/smollm2-135m-instruct);
# PEERS_PYTHON: a Python with torch, transformers and peft (else .venv-peers is made, which takes about 6 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
model=${MODEL:-models/smollm2-135m-instruct}
threads=${THREADS:-2}
sizes=(--batch 2 --seq 256 --threads "$threads" --warmup "${WARMUP:-2}" --steps "${STEPS:-8}")

peers_python() {
    local python=${PEERS_PYTHON:-.venv-peers/bin/python}
    if ! "$python" -c 'import torch, transformers, peft' 2>/dev/null; then
        echo "making .venv-peers (torch, transformers, peft: about 6 GB)" >&2
        rm -rf .venv-peers
        python3 -m venv .venv-peers
        .venv-peers/bin/pip install -q torch==2.15.0 transformers==5.23.0 peft==0.21.2 >&2
        python=.venv-peers/bin/python
    fi
    echo "$python"
}

bench_cpu() {
    local python binary results round log
    [ -f "$model/config.json" ] || { echo "error: no checkpoint in $model; run scripts/quickstart.sh first" >&2; exit 2; }
    python=$(peers_python)
    cargo build --release --locked --workspace --bins
    binary=${CARGO_TARGET_DIR:-target}/release/lowrank-bench
    results=$(mktemp) log=$(mktemp)
    # shellcheck disable=SC2064
    trap "rm -f '$results' '$log'" EXIT
    export RAYON_NUM_THREADS=$threads
    awk '$1 > 0.5 { print "warning: load " $1 ": other programs run, and a busy machine distorts the ratios" }' /proc/loadavg >&2
    for ((round = 1; round <= ${ROUNDS:-3}; round++)); do
        echo "round $round of ${ROUNDS:-3}, load $(cut -d' ' -f1 /proc/loadavg)" >&2
        "$python" scripts/bench/peer_cpu.py "$model" "${sizes[@]}" 2>"$log" | tee -a "$results" >&2 || { cat "$log" >&2; exit 1; }
        "$binary" cpu --model "$model" "${sizes[@]}" --checkpointing none | tee -a "$results" >&2
        "$binary" cpu --model "$model" "${sizes[@]}" --checkpointing block | tee -a "$results" >&2
    done
    python3 scripts/bench/table.py <"$results"
}

case ${1:-} in
cpu) bench_cpu ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac

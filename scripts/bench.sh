#!/usr/bin/env bash
# Speed and memory of a training step, ours and a peer's, alternating in one call; prints a Markdown table.
#
#   scripts/bench.sh cpu        SmolLM2-135M, LoRA r=16 on all linear layers, 2 x 256 tokens, f32, 2 threads,
#                               median of 8 steps after 2, against peft
#   scripts/bench.sh galore     LLaMA shapes with random weights, rank hidden / 4, gap 200, 8 x 256 tokens, f32, 2 threads,
#                               median of 5 steps after 2: full AdamW and GaLore, projected and exact, against galore-torch
#                               and torch; with what the flops of each method predict
#   scripts/bench.sh adapters   SmolLM2-135M, every adapter at rank 16 on all linear layers, 8 x 256 tokens, f32, 2 threads,
#                               median of 4 steps after 1, with what each costs over LoRA, against peft where it has the method
#   scripts/bench.sh gpu        on a graphics card, bf16: matrix products against torch; each kernel beside its floor; steps of
#                               LoRA, QLoRA, full AdamW and GaLore on Llama shapes, sequences of 2048, against peft (eager,
#                               compiled, Liger), bitsandbytes and galore-torch; about 20 minutes on an H200
#
# ROUNDS (3; adapters 2) runs of each program; STEPS (8; galore 5), WARMUP (2), THREADS (2);
# PEERS_PYTHON: a Python with torch, transformers and peft (else .venv-peers is made, which takes about 6 GB); galore also
# needs galore-torch, without its dependencies; LOWRANK_BENCH: a built lowrank-bench (else it is built).
# cpu, adapters: MODEL (models/smollm2-135m-instruct); adapters: METHODS, PEERS (lora dora vera randlora): which, in this order.
# galore: SHAPE (llama-130m), a folder in configs/pretrain/models; SEQ (256) and TOKENS (2048) of a step: SEQ=2048 is one
# sequence; RANK; DEVICE (cpu): ours runs there, the peers on cuda if that is asked for and their torch has it, else on the
# CPU; PROGRAMS (full input std exact galore-torch torch): which, in this order.
# gpu: DEVICE (auto); PARTS (gemm kernels steps); WORKLOADS (the names in gpu_workload), PEERS_PYTHON (python3; none leaves
# the peers out); LOWRANK_BENCH_CPP: a lowrank-bench built with cuda-cpp, whose products are measured too; RESULTS: file that
# the lines are added to (else they are not kept); LIMIT (300): seconds for one program; QUICK=1: tiny shapes, f32, anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
threads=${THREADS:-2}
warmup=${WARMUP:-2}
rounds=${ROUNDS:-3}

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit 2
}

# A Python for the peers.
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

# Adds galore-torch to .venv-peers, without bitsandbytes, which only its 8-bit optimiser uses.
need_galore_torch() {
    "$1" -c 'from importlib.metadata import version; version("galore-torch")' 2>/dev/null && return
    if [ "$1" != .venv-peers/bin/python ]; then
        echo "error: no galore-torch in $1: $1 -m pip install --no-deps galore-torch==1.0" >&2
        exit 2
    fi
    "$1" -m pip install -q --no-deps galore-torch==1.0 >&2
}

# Sets `binary`; arguments go to cargo.
build() {
    binary=${LOWRANK_BENCH:-}
    if [ -z "$binary" ]; then
        cargo build --release --locked --workspace --bins "$@"
        binary=${CARGO_TARGET_DIR:-target}/release/lowrank-bench
    fi
}

# Sets `results` and `log`, which go away at the end, and warns on a busy machine.
prepare() {
    results=$(mktemp) log=$(mktemp)
    # shellcheck disable=SC2064
    trap "rm -f '$results' '$log'" EXIT
    export RAYON_NUM_THREADS=$threads
    awk '$1 > 0.5 { print "warning: load " $1 ": other programs run, and a busy machine distorts the ratios" }' /proc/loadavg >&2
}

# Runs one program of ours: its line goes to the results and to the terminal.
ours() {
    "$binary" step "$@" | tee -a "$results" >&2
}

# Runs one peer; what it says beside its line is shown when it fails.
peer() {
    "$@" 2>"$log" | tee -a "$results" >&2 || { cat "$log" >&2; exit 1; }
}

announce() {
    echo "round $1 of $rounds, load $(cut -d' ' -f1 /proc/loadavg)" >&2
}

bench_cpu() {
    local python round model=${MODEL:-models/smollm2-135m-instruct}
    local sizes=(--batch 2 --seq 256 --threads "$threads" --warmup "$warmup" --steps "${STEPS:-8}")
    [ -f "$model/config.json" ] || { echo "error: no checkpoint in $model; run scripts/quickstart.sh first" >&2; exit 2; }
    python=$(peers_python)
    build
    prepare
    for ((round = 1; round <= rounds; round++)); do
        announce "$round"
        peer "$python" scripts/bench/peer_cpu.py "$model" "${sizes[@]}"
        ours --model "$model" "${sizes[@]}" --checkpointing none
        ours --model "$model" "${sizes[@]}" --checkpointing block
    done
    python3 scripts/bench/table.py <"$results"
}

# One program of the GaLore benchmark, by its name in PROGRAMS. Without stagger every refresh falls into the first step, which
# is not counted; its time is reported apart.
galore_program() {
    local low_rank="rank = $rank, update_proj_gap = $gap, stagger = false"
    local own=(--model "$model" --random "${sizes[@]}" --device "$device" --checkpointing none --optimizer)
    local other=(scripts/bench/peer_galore.py "$model" "${sizes[@]}" --rank "$rank" --gap "$gap" --device "$device" --method)
    case $1 in
    full) ours "${own[@]}" 'adamw = {}' ;;
    input) ours "${own[@]}" "galore = { $low_rank, proj_type = \"input\" }" ;;
    std) ours "${own[@]}" "galore = { $low_rank, proj_type = \"std\" }" ;;
    exact) ours "${own[@]}" "galore = { $low_rank, proj_type = \"std\", exact = true }" ;;
    galore-torch) peer "$python" "${other[@]}" galore ;;
    torch) peer "$python" "${other[@]}" full ;;
    esac
}

bench_galore() {
    local python='' round program hidden features=() programs=()
    local device=${DEVICE:-cpu} gap=200 seq=${SEQ:-256} tokens=${TOKENS:-2048}
    local model=configs/pretrain/models/${SHAPE:-llama-130m}
    read -ra programs <<<"${PROGRAMS:-full input std exact galore-torch torch}"
    [ -f "$model/config.json" ] || { echo "error: no shape $model; there are: $(ls configs/pretrain/models)" >&2; exit 2; }
    ((tokens >= seq && tokens % seq == 0)) || { echo "error: TOKENS=$tokens is no multiple of SEQ=$seq" >&2; exit 2; }
    ((warmup >= 1)) || { echo "error: WARMUP must be at least 1: the first step has the refreshes" >&2; exit 2; }
    for program in "${programs[@]}"; do
        case $program in
        full | input | std | exact) ;;
        galore-torch | torch) python=${python:-$(peers_python)} ;;
        *) echo "error: PROGRAMS has $program, expected full, input, std, exact, galore-torch or torch" >&2; exit 2 ;;
        esac
        [ "$program" != galore-torch ] || need_galore_torch "$python"
    done
    hidden=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["hidden_size"])' "$model/config.json")
    local rank=${RANK:-$((hidden / 4))} batch=$((tokens / seq))
    local sizes=(--batch "$batch" --seq "$seq" --threads "$threads" --warmup "$warmup" --steps "${STEPS:-5}")
    case $device in cuda* | vulkan* | metal*) features=(--features "${device%%:*}") ;; esac
    build "${features[@]}"
    prepare
    for ((round = 1; round <= rounds; round++)); do
        announce "$round"
        for program in "${programs[@]}"; do
            galore_program "$program"
        done
    done
    python3 scripts/bench/table_galore.py "$model/config.json" --batch "$batch" --seq "$seq" --gap "$gap" <"$results"
}

# The table of one method at rank 16.
adapter_table() {
    case $1 in
    lora | dora | pissa | olora | corda | lora_xs | lora_sb) echo "$1 = { r = 16, lora_alpha = 32 }" ;;
    randlora) echo "randlora = { r = 16, randlora_alpha = 320 }" ;;
    tucker) echo "tucker = { r_in = 16, r_out = 16 }" ;;
    oft) echo "oft = { oft_block_size = 32 }" ;;
    *) echo "$1 = { r = 16 }" ;;
    esac
}

bench_adapters() {
    local python='' round method methods=() peers=() model=${MODEL:-models/smollm2-135m-instruct}
    local sizes=(--batch 8 --seq 256 --threads "$threads" --warmup "${WARMUP:-1}" --steps "${STEPS:-4}")
    read -ra methods <<<"${METHODS:-lora dora pissa vera randlora lora_xs svfit tucker hra oft}"
    read -ra peers <<<"${PEERS-lora dora vera randlora}"
    rounds=${ROUNDS:-2}
    [ -f "$model/config.json" ] || { echo "error: no checkpoint in $model; run scripts/quickstart.sh first" >&2; exit 2; }
    [ ${#peers[@]} = 0 ] || python=$(peers_python)
    build
    prepare
    for ((round = 1; round <= rounds; round++)); do
        announce "$round"
        for method in "${methods[@]}"; do
            ours --model "$model" "${sizes[@]}" --adapter "$(adapter_table "$method")"
        done
        for method in "${peers[@]}"; do
            peer "$python" scripts/bench/peer_cpu.py "$model" --method "$method" "${sizes[@]}"
        done
    done
    python3 scripts/bench/table.py <"$results"
}

# Runs one program of the GPU benchmark: its lines are kept as they come, and a failure becomes a line of its own.
gpu_program() {
    local status=0
    timeout "${LIMIT:-300}" "$@" 2>"$log" | tee -a "$results" "${RESULTS:-/dev/null}" >&2 || status=$?
    [ "$status" != 0 ] || return 0
    cat "$log" >&2
    failure_line "$status" "$*" | tee -a "$results" "${RESULTS:-/dev/null}" >&2
}

# A line for the report: status, command; why is the last error in the log.
failure_line() {
    python3 - "$1" "$log" "$2" <<'PYTHON'
import json, sys
status, log, command = sys.argv[1:]
lines = [line for line in open(log, encoding="utf-8", errors="replace").read().splitlines() if line.strip()]
errors = [line for line in lines if "error" in line.lower() or "panicked" in line] or lines
why = "took too long" if status == "124" else f"status {status}: " + " ".join(errors[-1:])[:300]
print(json.dumps({"bench": "failure", "command": command, "why": why}))
PYTHON
}

# The step of one workload: model, sequences, what is trained by us and by the peers. Nothing is recomputed, except where memory
# is the point.
gpu_workload() {
    local model rows own=() peers=()
    case $1 in
    lora-1b) model=configs/bench/llama-1b rows=8 peers=(lora:eager lora:compiled lora:liger) ;;
    lora-8b) model=configs/bench/llama-8b rows=4 peers=(lora:eager lora:compiled lora:liger) ;;
    qlora-8b) model=configs/bench/llama-8b rows=1 own=(--quantization nf4) peers=(qlora:eager) ;;
    full-350m | full-1b) rows=8 own=(--optimizer 'adamw = {}') peers=(full:eager full:compiled) ;;
    galore-350m | galore-1b) rows=8 peers=(galore:eager) ;;
    q-galore-7b) model=configs/pretrain/models/llama-7b rows=1 ;; # for its memory; no peer runs it here
    *) echo "error: WORKLOADS has $1, expected lora-1b lora-8b qlora-8b full-350m galore-350m full-1b galore-1b q-galore-7b" >&2; exit 2 ;;
    esac
    case $1 in
    *-350m) model=configs/pretrain/models/llama-350m hidden=1024 ;;
    full-1b | galore-1b) model=configs/pretrain/models/llama-1b rows=4 hidden=2048 ;;
    esac
    [ -z "$quick" ] || model=configs/pretrain/models/llama-tiny rows=1 hidden=256
    if [ "${1%%-*}" = galore ]; then
        own=(--optimizer "galore = { rank = $((hidden / 4)), update_proj_gap = 200, stagger = false }")
    elif [ "$1" = q-galore-7b ]; then
        own=(--optimizer "q_galore = { rank = $([ -z "$quick" ] && echo 1024 || echo 64), update_proj_gap = 200 }" --checkpointing block)
    fi
    gpu_program "$binary" step --model "$model" --random --workload "$1" --device "$device" --batch "$rows" \
        "${sizes[@]}" --threads "$(nproc)" "${own[@]}"
    [ "$python" != none ] || return 0
    for peer in "${peers[@]}"; do
        gpu_program "$python" scripts/bench/peer_gpu.py "$model" --workload "$1" --device "$peer_device" \
            --method "${peer%:*}" --variant "${peer#*:}" --batch "$rows" "${sizes[@]}"
    done
}

bench_gpu() {
    local device=${DEVICE:-auto} python=${PEERS_PYTHON:-python3} quick=${QUICK:-} peer_device=cuda peer workload features=()
    local parts=() workloads=() small=() dtype=bf16 seq=2048 hidden=0
    read -ra parts <<<"${PARTS:-gemm kernels steps}"
    read -ra workloads <<<"${WORKLOADS:-lora-1b lora-8b qlora-8b full-350m galore-350m galore-1b full-1b q-galore-7b}"
    if [ -n "$quick" ]; then
        [ -n "${WORKLOADS:-}" ] || workloads=(lora-1b qlora-8b full-350m galore-350m q-galore-7b)
        small=(--quick) dtype=${DTYPE:-f32} seq=32 peer_device=cpu
    fi
    if [ "$python" != none ] && ! "$python" -c 'import torch, transformers, peft' 2>/dev/null; then
        echo "error: $python has no torch, transformers and peft" >&2
        printf '\nhint: PEERS_PYTHON names one that has, or PEERS_PYTHON=none leaves the peers out\n' >&2
        exit 2
    fi
    case $device in cuda* | vulkan* | metal*) features=(--features "${device%%:*}") ;; esac
    build "${features[@]}"
    prepare
    local sizes=(--seq "$seq" --dtype "$dtype" --warmup "${WARMUP:-3}" --steps "${STEPS:-10}")
    for part in "${parts[@]}"; do
        case $part in
        gemm)
            gpu_program "$binary" gemm --device "$device" --dtype "$dtype" "${small[@]}"
            if [ -n "${LOWRANK_BENCH_CPP:-}" ] && [ "${device%%:*}" = cuda ]; then
                gpu_program env CUBECL_ENVIRONMENT=lowrank-cpp "$LOWRANK_BENCH_CPP" gemm --device "$device" --dtype "$dtype"
            fi
            [ "$python" = none ] || gpu_program "$python" scripts/bench/peer_gemm.py --device "$peer_device" "${small[@]}" \
                --dtype "$dtype"
            ;;
        kernels) gpu_program "$binary" kernels --device "$device" --dtype "$dtype" "${small[@]}" ;;
        steps)
            for workload in "${workloads[@]}"; do
                gpu_workload "$workload"
            done
            ;;
        *) echo "error: PARTS has $part, expected gemm, kernels or steps" >&2; exit 2 ;;
        esac
    done
    python3 scripts/bench/table_gpu.py <"$results"
}

case ${1:-} in
cpu) bench_cpu ;;
gpu) bench_gpu ;;
adapters) bench_adapters ;;
galore) bench_galore ;;
*) usage ;;
esac

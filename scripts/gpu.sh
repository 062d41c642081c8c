#!/usr/bin/env bash
# Everything that needs a graphics card, in one call: correctness first, then the benchmarks, then a report.
#
#   scripts/gpu.sh [--device cuda|vulkan|all] [--quick]      default: all that the machine has
#   scripts/gpu.sh --pack FILE.tar.xz                         build for another machine, which may lack Rust and the internet
#
# 1. what the machine is: card, driver, commit         2. every kernel against the CPU, in every type that the card has
# 3. the reference cases of torch and peft             4. scripts/bench.sh gpu: products, kernels, steps, peers
# 5. a Markdown report in docs/benchmarks/gpu-DEVICE.md; all results as JSON lines beside it, kept as they come
#
# --device vulkan alone goes through wgpu where the build has no SPIR-V compiler; the report says so. --quick uses tiny shapes
# and runs on software Vulkan in some minutes: a test of this script, not of speed.
#
# BINARY: folder, or file from --pack, with lowrank-bench and goldens, and in cpp/ a lowrank-bench that goes to CUDA by way of
# C++ (else all are built here: see scripts/cuda-llvm.sh for what that needs); OUT (docs/benchmarks): folder of the report;
# STAGES (check goldens bench): which; PARTS, WORKLOADS, PEERS_PYTHON, LIMIT as in scripts/bench.sh.
# CUDA at run time: libdevice.10.bc for LLVM, NVRTC and headers for C++; CUDA_PATH (/usr/local/cuda) names the toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '\nhint: %s\n' "$2" >&2
    exit 2
}

usage() {
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit 2
}

device=all quick='' pack=
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=${2:-} && shift ;;
    --quick) quick=1 ;;
    --pack) pack=${2:-} && shift ;;
    *) usage ;;
    esac
    shift
done
case $device in cuda | vulkan | all) ;; *) fail "--device is \"$device\"" "cuda, vulkan or all" ;; esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log

has_nvidia() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

# Builds the two programs into a folder: features, folder.
build_into() {
    local target=${CARGO_TARGET_DIR:-target}/release
    cargo build --release --locked --workspace --bins ${1:+--features "$1"} >&2
    mkdir -p "$2"
    cp "$target/lowrank-bench" "$target/goldens" "$2/"
}

# Both builds, stripped, with the libraries that not every machine has. The builds share most of their code, which a large
# dictionary packs once.
make_pack() {
    local folder=$scratch/pack library
    case $pack in *.tar.xz) ;; *) fail "--pack $pack" "the name ends in .tar.xz" ;; esac
    build_into cuda,vulkan,persistence "$folder"
    build_into cuda-cpp,vulkan,persistence "$folder/cpp"
    rm "$folder/cpp/goldens"
    strip "$folder"/lowrank-bench "$folder"/goldens "$folder"/cpp/lowrank-bench
    mkdir -p "$folder/lib"
    ldd "$folder/lowrank-bench" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | while read -r library; do
        case ${library##*/} in
        libc.so* | libm.so* | libdl.so* | libpthread.so* | librt.so* | libgcc_s.so* | libstdc++.so* | ld-linux*) ;;
        *) cp -L "$library" "$folder/lib/" ;;
        esac
    done
    git describe --always --dirty '--exclude=*' >"$folder/commit"
    tar -C "$folder" -c . | xz -T1 --lzma2=preset=6,dict=512MiB >"$pack"
    echo "$pack: $(du -h "$pack" | cut -f1), commit $(cat "$folder/commit")"
}

if [ -n "$pack" ]; then
    make_pack
    exit 0
fi

# Sets `binaries`, a folder.
find_binaries() {
    binaries=${BINARY:-}
    if [ -z "$binaries" ]; then
        local features=
        has_nvidia && features=cuda,vulkan,persistence
        binaries=$scratch/bin
        build_into "$features" "$binaries"
    elif [ -f "$binaries" ]; then
        mkdir -p "$scratch/bin"
        if command -v xz >/dev/null; then
            xz -d -T0 --memlimit=4GiB <"$binaries" | tar -C "$scratch/bin" -x
        else
            python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$binaries" "$scratch/bin"
        fi
        binaries=$scratch/bin
    fi
    if ! [ -x "$binaries/lowrank-bench" ] || ! [ -x "$binaries/goldens" ]; then
        fail "no lowrank-bench and goldens in ${BINARY:-$binaries}" "scripts/gpu.sh --pack FILE.tar.xz makes such a file"
    fi
    [ ! -d "$binaries/lib" ] || export LD_LIBRARY_PATH=$binaries/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    "$binaries/lowrank-bench" --version >/dev/null || fail "$binaries/lowrank-bench does not start" "see above; ldd tells"
}

# One JSON line for the report, from pairs: note machine what Card value "NVIDIA H200".
note() {
    python3 -c 'import json, sys; a = sys.argv[1:]; print(json.dumps({"bench": a[0], **dict(zip(a[1::2], a[2::2]))}))' "$@" |
        tee -a "$results"
}

# Runs a program; its lines of results are kept, and a failure becomes a line of its own.
keep() {
    local status=0 why
    timeout "${LIMIT:-600}" "$@" 2>"$log" | tee -a "$results" || status=$?
    [ "$status" != 0 ] || return 0
    tail -n 40 "$log" >&2
    why=$(grep -iE 'error|panicked|failed' "$log" | tail -n 1)
    [ "$status" != 124 ] || why="took longer than ${LIMIT:-600} s"
    note failure command "$*" why "status $status: ${why:0:300}"
}

describe_machine() {
    note machine what Date value "$(date -u +%Y-%m-%d)"
    note machine what Machine value "$(awk -F': ' '/model name/ { print $2; exit }' /proc/cpuinfo), $(nproc) cores"
    if has_nvidia; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | while read -r line; do
            note machine what "Card, driver, memory, clock" value "$line"
        done
    fi
    local toolkit=${CUDA_PATH:-/usr/local/cuda}
    if [[ " ${devices[*]} " == *" cuda "* ]]; then
        [ -f "$toolkit/nvvm/libdevice/libdevice.10.bc" ] ||
            note failure command "CUDA through LLVM" why "no $toolkit/nvvm/libdevice/libdevice.10.bc: kernels with exp or log will not compile; set CUDA_PATH"
    fi
}

# Which devices to test: those asked for that the build and the machine have.
choose_devices() {
    local name wanted
    devices=()
    case $device in all) wanted="cuda vulkan" ;; *) wanted=$device ;; esac
    for name in $wanted; do
        if "${for_correctness[@]}" "$binaries/lowrank-bench" kernels --check --quick --device "$name" --only sum_squares >"$log" 2>&1; then
            devices+=("$name")
        elif [ "$name" = vulkan ] && grep -q 'is not in this build' "$log"; then
            echo "this build has no SPIR-V compiler: Vulkan goes through wgpu (WGSL)" >&2
            devices+=(wgpu)
        elif [ "$device" = all ]; then
            echo "no $name here: $(grep -iE 'error|panicked' "$log" | head -n 1)" >&2
        else
            cat "$log" >&2
            fail "nothing runs on $name" "see above"
        fi
    done
    [ ${#devices[@]} -gt 0 ] || fail "neither CUDA nor Vulkan works here" "see above"
}

# What is right needs little tuning; its results are kept apart from those of the benchmarks.
for_correctness=(env CUBECL_AUTOTUNE_LEVEL=minimal CUBECL_ENVIRONMENT=lowrank-check)

stage_check() {
    keep "${for_correctness[@]}" "$binaries/lowrank-bench" kernels --check --device "$1" "${small[@]}"
}

# A line for each reference case.
stage_goldens() {
    local status=0 only=() line
    [ -z "$quick" ] || only=(--only forward_tiny-llama --only lora_qv_r4)
    timeout "${LIMIT:-600}" "${for_correctness[@]}" "$binaries/goldens" crates/testkit/goldens --device "$1" "${only[@]}" >"$scratch/goldens" 2>"$log" ||
        status=$?
    while read -r line; do
        note golden device "$1" line "$line"
    done <"$scratch/goldens"
    [ "$status" -lt 2 ] || note failure command "goldens --device $1" why "status $status: $(tail -n 1 "$log")"
}

# The second device is there for its ratio to the first: one workload tells.
stage_bench() {
    local cpp=$binaries/cpp/lowrank-bench workloads=${WORKLOADS:-}
    [ -x "$cpp" ] || cpp=
    [ "$1" = "${devices[0]}" ] || workloads=${WORKLOADS:-lora-1b}
    DEVICE=$1 WORKLOADS=$workloads QUICK=$quick RESULTS=$results LOWRANK_BENCH=$binaries/lowrank-bench LOWRANK_BENCH_CPP=$cpp \
        PEERS_PYTHON=$peers scripts/bench.sh gpu >/dev/null ||
        note failure command "scripts/bench.sh gpu on $1" why "status $?"
}

find_binaries
[ -z "$quick" ] || export CUBECL_AUTOTUNE_LEVEL=${CUBECL_AUTOTUNE_LEVEL:-minimal}
small=()
[ -z "$quick" ] || small=(--quick)
devices=()
choose_devices
out=${OUT:-docs/benchmarks}
mkdir -p "$out"
name=$(IFS=-; echo "${devices[*]}")
if has_nvidia; then
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
fi
[ -z "$quick" ] || name+=-quick
report=$out/gpu-$name.md results=$out/gpu-$name.jsonl
: >"$results"
describe_machine
peers=${PEERS_PYTHON:-python3}
if [ "$peers" != none ] && ! "$peers" -c 'import torch, transformers, peft' 2>/dev/null; then
    note machine what Peers value "not measured, $peers has no torch, transformers and peft"
    peers=none
fi
# Correctness of all devices first. The peers run once, beside the first device.
for stage in ${STAGES:-check goldens bench}; do
    declare -F "stage_$stage" >/dev/null || fail "no stage $stage" "check goldens bench"
    for each in "${devices[@]}"; do
        echo "== $stage on $each, after $SECONDS s" >&2
        "stage_$stage" "$each"
        [ "$stage" != bench ] || peers=none
    done
done
python3 scripts/bench/table_gpu.py --title "Results on ${name//-/ }" <"$results" >"$report"
failures=$(grep -cE '"bench": ?"failure"|"ok": ?false|"line": ?"failed' "$results" || true)
echo "$report, $SECONDS s, $failures failures"
[ "$failures" = 0 ]

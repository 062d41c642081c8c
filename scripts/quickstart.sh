#!/usr/bin/env bash
# From nothing to a fine-tuned model: fetches SmolLM2-135M-Instruct, builds lowrank-train, teaches the model to turn a
# sentence into JSON (data/demo) with LoRA on whatever device there is, and compares before and after.
#
#   ./scripts/quickstart.sh [--set key=value]...        overrides for the configuration, such as --set device=cpu
#
# Needs Rust and Python 3; on Debian, as root, installs a missing C compiler or python3-venv. Running it again repeats
# nothing that is done: the model is kept, and a run that was stopped goes on. SAMPLES (64) unseen examples are answered.
set -euo pipefail
cd "$(dirname "$0")/.."
model=models/smollm2-135m-instruct
config=configs/finetune/smollm2-lora.toml
results=runs/quickstart
samples=${SAMPLES:-64}
overrides=("$@")

say() {
    printf '\n== %s\n' "$*"
}

install_missing() {
    local needed=()
    command -v cc >/dev/null || needed+=(gcc libc6-dev)
    python3 -c 'import ensurepip' 2>/dev/null || needed+=(python3-venv)
    [ ${#needed[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "error: this machine lacks ${needed[*]} (Debian's names)" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${needed[@]}"
}

fetch_model() {
    python3 scripts/fetch_smollm2.py "$model" --check && return
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check numpy gguf tokenizers
    .venv/bin/python scripts/fetch_smollm2.py "$model"
}

evaluate() { # NAME [OPTION...]: loss and exact match on unseen examples, into $results/NAME.json
    local name=$1
    shift
    "$binary" eval --config "$config" "${overrides[@]}" --set evaluation.generate=true --data data/demo/test.jsonl --max-samples "$samples" \
        --out "$results/$name.json" "$@"
}

for tool in cargo python3; do
    command -v "$tool" >/dev/null || { echo "error: $tool is not installed" >&2; exit 1; }
done
install_missing
mkdir -p "$results"

say "1/6 model: $model"
fetch_model
say "2/6 build (the first time takes 10 to 20 minutes on two cores)"
cargo build --release --locked --workspace --bins
binary=${CARGO_TARGET_DIR:-target}/release/lowrank-train
say "3/6 before: $samples unseen examples"
evaluate before --model "$model"
say "4/6 fine-tuning: $config"
"$binary" --config "$config" "${overrides[@]}"
say "5/6 after: the same examples"
evaluate after
say "6/6 one answer"
sentence="Please send seven telescopes to Fiona in Nairobi."
echo "$sentence"
"$binary" generate --config "$config" "${overrides[@]}" --system "Answer in JSON." --prompt "$sentence" --max-new-tokens 64

python3 - "$results/before.json" "$results/after.json" <<'PYTHON'
import json
import sys

before, after = (json.load(open(path, encoding="utf-8")) for path in sys.argv[1:])
print("\n| unseen examples | before | after |\n| --- | --- | --- |")
print(f"| loss | {before['loss']:.3f} | {after['loss']:.3f} |")
print(f"| exact match of {after['exact_match_samples']} answers | {before['exact_match']:.1%} | {after['exact_match']:.1%} |")
if after["exact_match"] < 0.9:
    sys.exit("error: exact match is below 90 %: training went wrong")
PYTHON

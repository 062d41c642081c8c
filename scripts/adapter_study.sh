#!/usr/bin/env bash
# The study of adapters from nothing: text, tokenizer, a small base model pre-trained on it, every method on the demo task with
# a grid of learning rates and three seeds, and the report in docs/benchmarks.
#
#   scripts/adapter_study.sh             about 20 minutes of pre-training and an hour for the study, on two idle CPU cores
#
# Stop and start as you like: what is done is kept. Needs Python 3 and the built program (cargo build --release), or
# LOWRANK_TRAIN=FILE. The base model is models/llama-adapters, all runs are in runs/compare/adapters.
set -euo pipefail
cd "$(dirname "$0")/.."

model=models/llama-adapters
program=${LOWRANK_TRAIN:-${CARGO_TARGET_DIR:-target}/release/lowrank-train}
if [ ! -x "$program" ]; then
    echo "error: there is no program $program" >&2
    echo "hint: cargo build --release, or set LOWRANK_TRAIN to the program" >&2
    exit 1
fi

if [ ! -f "$model/model.safetensors" ]; then
    python3 scripts/fetch_text.py data/text --source austen
    python3 scripts/make_demo_data.py --notes data/text/notes.jsonl
    mkdir -p "$model/start"
    cp configs/compare/adapters-model/config.json "$model/start/"
    if [ ! -f "$model/start/tokenizer.json" ]; then
        "$program" tokenizer --corpus data/text/train.txt data/text/notes.jsonl --vocab-size 2048 --output "$model/start"
    fi
    # How a conversation becomes text: the sentence, a line break, the answer.
    python3 - "$model/start/tokenizer_config.json" <<'PYTHON'
import json
import sys

path = sys.argv[1]
with open(path, encoding="utf-8") as file:
    config = json.load(file)
config["chat_template"] = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
with open(path, "w", encoding="utf-8") as file:
    json.dump(config, file, indent=2)
PYTHON
    "$program" --config configs/compare/adapters-pretrain.toml
    cp runs/compare/adapters-pretrain/model/* "$model/"
fi

"$program" compare configs/compare/adapters.toml "$@"
for kind in md csv html; do
    cp "runs/compare/adapters/report.$kind" "docs/benchmarks/adapter-study.$kind"
done
echo "wrote docs/benchmarks/adapter-study.{md,csv,html}"

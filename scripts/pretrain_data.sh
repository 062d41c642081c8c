#!/usr/bin/env bash
# Everything that a first pre-training needs, without a model hub: public-domain text, a tokenizer learned from it,
# and a model folder without weights. None of it is in git.
#
#   scripts/pretrain_data.sh      data/text/{train,eval}.txt, models/llama-tiny/{config,tokenizer,tokenizer_config}.json
#
# Needs Python 3 and the built program: cargo build --release. LOWRANK_TRAIN names another program than the one in
# $CARGO_TARGET_DIR (or target). What is there already is kept: running it again costs a second.
set -euo pipefail
cd "$(dirname "$0")/.."

model=models/llama-tiny
shapes=configs/pretrain/models/llama-tiny/config.json
program=${LOWRANK_TRAIN:-${CARGO_TARGET_DIR:-target}/release/lowrank-train}

python3 scripts/fetch_text.py data/text
mkdir -p "$model"
cp "$shapes" "$model/config.json"
if [ -f "$model/tokenizer.json" ]; then
    echo "$model has a tokenizer already"
elif [ -x "$program" ]; then
    # The vocabulary fills the embedding of the model.
    size=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["vocab_size"])' "$shapes")
    "$program" tokenizer --corpus data/text/train.txt --vocab-size "$size" --output "$model" --force
else
    echo "error: there is no program $program" >&2
    echo "hint: cargo build --release, or set LOWRANK_TRAIN to the program" >&2
    exit 1
fi
echo "ready: $model on data/text"

#!/usr/bin/env bash
# Runs every reference case of a folder through the public path and prints one line per case:
#   passed NAME | failed NAME: why | unsupported NAME: why        exit status 1 if any failed
#
#   scripts/goldens.sh [FOLDER]        default: $LOWRANK_GOLDENS, else the copy in crates/testkit/goldens
# LOWRANK_SMOLLM2 names the folder of the real checkpoint for the cases that need it (default: models/smollm2-135m-instruct
# where scripts/quickstart.sh has put it; without it those cases are unsupported).
set -euo pipefail
folder=$(realpath "${1:-${LOWRANK_GOLDENS:-$(dirname "$0")/../crates/testkit/goldens}}")
cd "$(dirname "$0")/.."
[ -d "$folder" ] || { echo "error: $folder is not a folder of reference cases" >&2; exit 2; }
export LOWRANK_GOLDENS=$folder
if [ -z "${LOWRANK_SMOLLM2:-}" ] && [ -f models/smollm2-135m-instruct/config.json ]; then
    export LOWRANK_SMOLLM2=$PWD/models/smollm2-135m-instruct
fi
# the whole workspace, as every other script: building one package alone may select other features of the dependencies
cargo build --release --quiet --locked --workspace --bins
exec "${CARGO_TARGET_DIR:-target}/release/goldens" "$folder"

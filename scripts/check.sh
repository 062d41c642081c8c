#!/usr/bin/env bash
# Everything that must hold before a commit: format, lints, tests, reference cases, smoke configurations, documentation.
#
#   scripts/check.sh [PHASE...]        phases: format clippy build test goldens smoke docs sizes      default: all
#   scripts/check.sh cuda              that --features cuda,vulkan compiles, and the code of every kernel for CUDA, SPIR-V and
#                                      WGSL; needs no card, but what scripts/cuda-llvm.sh installs; 15 minutes from nothing
#
# Prints the seconds of each phase; exit status 1 if any failed. Tests of GPU code run on Mesa's software Vulkan where it
# is installed (Debian: mesa-vulkan-drivers). One cargo profile, release, so that a dependency is compiled once.
# shellcheck disable=SC2317  # the phases are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

lavapipe=(/usr/share/vulkan/icd.d/lvp_icd.*.json)
if [ -z "${VK_ICD_FILENAMES:-}" ] && [ -f "${lavapipe[0]}" ]; then
    export VK_ICD_FILENAMES=${lavapipe[0]}
fi
if [ -z "${XDG_RUNTIME_DIR:-}" ]; then
    XDG_RUNTIME_DIR=$(mktemp -d)
    export XDG_RUNTIME_DIR
    trap 'rm -rf "$XDG_RUNTIME_DIR"' EXIT
fi
export CUBECL_AUTOTUNE_LEVEL=${CUBECL_AUTOTUNE_LEVEL:-minimal}
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}
binary=${CARGO_TARGET_DIR:-target}/release/lowrank-train

rust_files() {
    git ls-files -z --cached --others --exclude-standard '*.rs'
}

# rustfmt by file: `cargo fmt` skips modules that a macro declares.
phase_format() {
    rust_files | xargs -0 rustfmt --check --edition 2024
}

phase_clippy() {
    cargo clippy --release --locked --workspace --all-targets -- -D warnings
}

phase_build() {
    cargo build --release --locked --workspace --bins
}

phase_test() {
    cargo test --release --locked --workspace
}

phase_goldens() {
    scripts/goldens.sh
}

phase_smoke() {
    local config log failed=0
    rm -rf runs/smoke
    mkdir -p runs/smoke
    for config in configs/smoke/*.toml; do
        log=runs/smoke/$(basename "$config" .toml).log
        if "$binary" --config "$config" >"$log" 2>&1; then
            echo "passed $config"
        else
            echo "failed $config:"
            sed 's/^/    /' "$log"
            failed=1
        fi
    done
    log=runs/smoke/compare.log
    if "$binary" compare configs/compare/adapters-smoke.toml >"$log" 2>&1; then
        echo "passed configs/compare/adapters-smoke.toml"
    else
        echo "failed configs/compare/adapters-smoke.toml:"
        sed 's/^/    /' "$log"
        failed=1
    fi
    return "$failed"
}

phase_docs() {
    python3 scripts/make_config_docs.py --check &&
        RUSTDOCFLAGS=-Dwarnings cargo doc --release --locked --workspace --no-deps --quiet
}

# In the dev profile, which has the code of no other phase but compiles ten times faster. Its folder is its own: with other
# features all of Burn is another build.
phase_cuda() {
    local features=lowrank-train/cuda,lowrank-train/vulkan,lowrank-train/persistence
    CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/cuda cargo check --locked --workspace --features "$features" &&
        CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/cuda cargo test --locked --package lowrank-kernels \
            --features codegen --lib codegen
}

# Reported, never fatal: long files and long functions (from `fn` to the brace of the same indentation).
phase_sizes() {
    # shellcheck disable=SC2016
    rust_files | xargs -0 awk '
        FNR == 1 { open = 0 }
        { lines[FILENAME] = FNR }
        match($0, /^ *(pub(\([a-z]+\))? )?(const |async |unsafe )*fn /) && !/}$/ && !/;$/ {
            indent = match($0, /[^ ]/) - 1; start = FNR; open = 1
            name = $0; sub(/.*fn /, "", name); sub(/[^a-z0-9_].*/, "", name)
        }
        open && /^ *}$/ && index($0, "}") - 1 == indent {
            if (FNR - start + 1 > 60) printf "%s:%d: fn %s has %d lines (alarm: 60)\n", FILENAME, start, name, FNR - start + 1
            open = 0
        }
        END { for (file in lines) if (lines[file] > 400) printf "%s has %d lines (alarm: 400)\n", file, lines[file] }'
}

summary=
status=0
[ $# -gt 0 ] || set -- format clippy build test goldens smoke docs sizes
for phase; do
    declare -F "phase_$phase" >/dev/null || { echo "error: no phase $phase" >&2; exit 2; }
    echo "== $phase"
    started=$SECONDS
    if "phase_$phase"; then result=ok; else result=FAILED status=1; fi
    summary+=$(printf '%-8s %-7s %5d s' "$phase" "$result" $((SECONDS - started)))$'\n'
done
printf '\n%s' "$summary"
[ "$status" = 0 ] && echo "all good" || echo "something failed: see above" >&2
exit "$status"

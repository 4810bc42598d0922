#!/usr/bin/env bash
# Installs what the tests need (nats-server, nats-py, ffmpeg, promtool, cargo-nextest) and runs them all.
#   ./tests/run.sh                 everything
#   ./tests/run.sh --only-tools    install, run nothing
#   ./tests/run.sh --only-nvcc     install the compiler that feature `cuda` needs, run nothing
#   ./tests/run.sh -- ARGS...      arguments for `cargo nextest run`, e.g. -- -p millrace-bus
set -euo pipefail
cd "$(dirname "$0")/.."
. deploy/tools.sh
if [ "${1:-}" = --only-nvcc ]; then
  need_python
  need_nvcc
  exit 0
fi
need_distribution ffmpeg prometheus
need_python
if ! cargo nextest --version >/dev/null 2>&1; then
  say "installing cargo-nextest (once, some minutes)"
  cargo install --quiet --locked cargo-nextest
fi
case "${1:-}" in
  --only-tools) exit 0 ;;
  --) shift ;;
esac
cargo build --workspace --locked --bins
cargo nextest run --workspace --locked "$@"

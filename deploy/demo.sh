#!/usr/bin/env bash
# Shows Millrace at work on this machine: installs what is missing, builds, captions the shipped clips and stills through
# separate actors on a real NATS server, and says how to do the same with your own files. No GPU needed.
#   ./deploy/demo.sh            the shipped clips and stills
#   ./deploy/demo.sh FILE...    your own
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || { echo "Rust is missing: install it from https://rustup.rs and run this again" >&2; exit 1; }
. deploy/tools.sh
need_distribution ffmpeg
need_python

say "building (the first time takes some minutes)"
cargo build --release --locked -p millrace
millrace=target/release/millrace
model=deploy/demo/model

files=("$@")
[ ${#files[@]} -gt 0 ] || files=(deploy/demo/clips/*.mp4 deploy/demo/clips/*.jpg deploy/demo/clips/*.png)
say "captioning ${#files[@]} files: $millrace caption --window 4 --model $model FILE..."
"$millrace" caption --window 4 --model "$model" "${files[@]}"

cat <<END

What happened: a nats-server was started, then a preprocess, a scheduler and an executor actor on it. Each file became
one job a window on the work queue JOBS; each caption was read from the job's output subject while it was written.

Your own files:        $millrace caption --model $model FILE.mp4 PHOTO.jpg
A service that stays:  $millrace up --model $model=demo        (in one terminal; prints the NATS URL)
                       $millrace caption --nats URL FILE.mp4   (in another; or publish jobs from any language,
                       see deploy/examples and docs/asyncapi.json)
The demo model knows coloured shapes only. A real one: --model Qwen/Qwen3-VL-2B-Instruct
END

#!/bin/sh
# Builds what tests/bench/cuda/faithfulness.py runs on a machine with a card, and packs it: .device/faithfulness.tar.xz, to be
# carried beside the working tree. Needs nvcc (CUDA_HOME or PATH) and a C compiler; no GPU. Run from the repository's root.
#   NATS_SERVER=PATH   the nats-server to pack [default: that of target/tools/venv, else of PATH]
set -eu
root=$(cd "$(dirname "$0")/../../.." && pwd); cd "$root"
out=$root/.device; stage=$out/faithfulness; rm -rf "$stage"; mkdir -p "$stage"
server=${NATS_SERVER:-${MILLRACE_NATS_SERVER:-}}
[ -n "$server" ] || server=$root/target/tools/venv/bin/nats-server
[ -x "$server" ] || server=$(command -v nats-server)

# Optimised as the release profile is where it counts, without its long link. One call: one set of features, one build of each crate.
CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo build --message-format=json-render-diagnostics \
  -p millrace -p millrace-kernels -p millrace-executor --features millrace/cuda,millrace-kernels/cuda,millrace-executor/cuda \
  --bin millrace --test cuda_ops --test cuda_steps --test cuda_fault --test cuda_memory --test cuda_engine --test card --example logits > "$out/build.json"
python3 - "$out/build.json" "$stage" <<'PYTHON'
import json, pathlib, shutil, sys
wanted = {"millrace", "cuda_ops", "cuda_steps", "cuda_fault", "cuda_memory", "cuda_engine", "card", "logits"}
for line in open(sys.argv[1]):
    record = json.loads(line)
    if record.get("executable") and record["target"]["name"] in wanted:
        shutil.copy2(record["executable"], pathlib.Path(sys.argv[2]) / record["target"]["name"])
        wanted.discard(record["target"]["name"])
sys.exit(f"not built: {wanted}" if wanted else 0)
PYTHON
strip "$stage"/*

# A driver library between the program and the real one: answers some calls with the faults that a test asks for.
here=tests/bench/cuda
cc -O1 -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$out/libcuda.so.1" -x c /dev/null
mkdir -p "$stage/fault" "$stage/bare"
cc -O1 -Wall -Werror -shared -fPIC -o "$stage/fault/libcuda.so" "$here/fault.c" -Wl,--no-as-needed "$out/libcuda.so.1"
# The same without a real library behind it: for machines without a driver.
cc -O1 -Wall -Werror -DBARE -shared -fPIC -o "$stage/bare/libcuda.so" "$here/fault.c"

cp "$server" "$stage/nats-server"
python3 -c 'import nats, os; print(os.path.dirname(nats.__file__))' > "$out/nats_py" 2>/dev/null ||
  "$(dirname "$server")/python" -c 'import nats, os; print(os.path.dirname(nats.__file__))' > "$out/nats_py"
cp -r "$(cat "$out/nats_py")" "$stage/nats"
find "$stage/nats" -name __pycache__ -prune -exec rm -rf {} +
tar -C "$stage" -cf - . | xz -T0 -6 > "$out/faithfulness.tar.xz"
rm -f "$out/build.json" "$out/nats_py" "$out/libcuda.so.1"
ls -l "$stage" "$out/faithfulness.tar.xz"

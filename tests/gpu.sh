#!/usr/bin/env bash
# The GPU tests and the benchmarks on a machine with one NVIDIA GPU, in ten minutes at most: none outlives its limit.
# What does not fit the GPU's memory is skipped, and says so. Exit codes: 0 all well, 1 a step failed, 2 there is no GPU
# that PyTorch can use, or no nvcc.
#     bash tests/gpu.sh              # every test but a step of FLUX, of each benchmark what matters most
#     bash tests/gpu.sh all          # all tests, three dtypes, torch.compile, ten models beside diffusers and peft too
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
if ! "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 2)'; then
    echo "No GPU: torch.cuda.is_available() is False. Run this with an NVIDIA GPU and a CUDA build of PyTorch." >&2
    exit 2
fi
if ! "$python" -c 'import sys; from csrc import ops; sys.exit(0 if ops.find_nvcc() else 2)'; then
    echo "No nvcc: put the CUDA toolkit's bin folder on PATH, or set CUDA_HOME." >&2
    exit 2
fi
"$python" -c 'import torch; p = torch.cuda.get_device_properties(0); print(f"{p.name}, {p.total_memory >> 30} GiB, sm_"
    f"{p.major}{p.minor}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")'

steps=() failed=0
step() {                                        # step NAME SECONDS COMMAND...: runs it, notes how it went
    local name=$1 limit=$2 start=$SECONDS code result; shift 2
    printf '\n== %s\n' "$name"
    timeout "$limit" "$@"; code=$?
    case $code in 0) result=ok ;; 124) result="over ${limit} s" ;; *) result="failed ($code)" ;; esac
    [ $code -eq 0 ] || failed=1
    steps+=("$(printf '%-34s %-14s %4d s' "$name" "$result" $((SECONDS - start)))")
}
step "build the fused ops"          100 "$python" csrc/ops.py build
if [ "$1" = all ]; then
    step "GPU tests"                900 "$python" -m pytest -q tests -k "cuda or gpu"
    step "fused ops against eager"  600 "$python" csrc/bench.py --compile
    step "rewards, full size"       600 "$python" csrc/bench.py rewards
    step "full-size models"        3600 "$python" csrc/bench.py model
else
    step "GPU tests"                300 "$python" -m pytest -q tests -k "(cuda or gpu) and not dgpo-flux"
    step "fused ops against eager"   40 "$python" csrc/bench.py --quick
    step "rewards, full size"        50 "$python" csrc/bench.py rewards --quick
    step "full-size models"         110 "$python" csrc/bench.py model --quick
fi

printf '\n%-34s %-14s %s\n' step result time
printf '%s\n' "${steps[@]}"
exit $failed

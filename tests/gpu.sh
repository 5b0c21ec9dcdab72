#!/usr/bin/env bash
# The GPU tests and the benchmarks on a machine with one NVIDIA GPU, in ten minutes at most: none outlives its limit, or
# the time that is left. What does not fit the GPU's memory is skipped, and says so; without diffusers, too, what is
# compared with it. All output goes to $OUT/gpu.log (/tmp if OUT is not set), a step's to gpu-*.log, tests' also to
# gpu-*.xml. Exit codes: 0 all well, 1 a step failed, 2 there is no GPU that PyTorch can use, or no nvcc.
#     bash tests/gpu.sh              # every test but a step of FLUX, of each benchmark what matters most
#     bash tests/gpu.sh all          # FLUX too, three dtypes, torch.compile, ten models beside diffusers and peft
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-$(command -v python3 || command -v python)}
out=${OUT:-/tmp} deadline=560 steps=() failures="" failed=0 group=""
[ "$1" = all ] && deadline=36000
export PYTHONUNBUFFERED=1

mkdir -p "$out" && rm -f "$out"/gpu-*.log "$out"/gpu-*.xml
exec > >(tee "$out/gpu.log") 2>&1
tee=$!
trap '[ "$group" ] && kill -KILL -- "-$group" 2>/dev/null; exec >&- 2>&-; wait $tee' EXIT
trap 'exit 1' INT TERM

step() {                                        # step LOG NAME SECONDS COMMAND...: runs it, notes how it went
    local log=$out/gpu-$1.log name=$2 limit=$3 start=$SECONDS code=124 result="no time left" from; shift 3
    [ "$limit" -le $((deadline - start)) ] || limit=$((deadline - start))
    printf '\n== %s, %d s at most\n' "$name" "$limit"
    from=$(cat "$log" 2>/dev/null | wc -c)
    if [ "$limit" -ge 10 ]; then                # INT: Python says what it has so far
        timeout -s INT -k 15 "$limit" "$@" > >(tee -a "$log") 2>&1 &
        group=$!; wait "$group"; code=$?
        kill -KILL -- "-$group" 2>/dev/null; group=""; sleep .2        # what it left running; the last of tee's lines
        case $code in 0) result=ok ;; 124 | 137) result="over $limit s" ;; *) result="failed ($code)" ;; esac
    fi
    steps+=("$(printf '%-26s %-14s %4d s' "$name" "$result" $((SECONDS - start)))")
    printf -- '-- %s\n' "${steps[-1]}"
    [ "$code" -eq 0 ] && return
    failed=1 failures+=$(printf '\n-- %s: %s\n' "$name" "$result"; tail -c "+$((from + 1))" "$log" | digest)$'\n'
    return 1
}

digest() {                                      # of a step's output what fits the end of ours: pytest's lines, the last
    local text; text=$(tr '\r\0' '\n\n')
    { grep -aE '^(FAILED|ERROR) ' <<<"$text" | head -n 8; grep -aE '^E  ' <<<"$text" | head -n 6; tail -n 5 <<<"$text"
    } | cut -c 1-150 | head -c 1700
}

"$python" - <<'END' || exit $?
import sys
import torch
from csrc import ops
if not torch.cuda.is_available():
    print("No GPU: torch.cuda.is_available() is False. Run this with an NVIDIA GPU and a CUDA build of PyTorch.")
    sys.exit(2)
if not ops.find_nvcc():
    print("No nvcc: put the CUDA toolkit's bin folder on PATH, or set CUDA_HOME.")
    sys.exit(2)
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, {p.total_memory >> 30} GiB, sm_{p.major}{p.minor}, PyTorch {torch.__version__}, "
      f"CUDA {torch.version.cuda}")
END
"$python" - <<'END'
import importlib.util
import torch
q = torch.zeros(1, 24, 1024, 64, device="cuda", dtype=torch.bfloat16)
print("diffusers, to compare with:", "there" if importlib.util.find_spec("diffusers") else "missing")
print("attention, if PyTorch may choose:", torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, q)).name)
END
kernels=(tests/test_csrc.py tests/test_loop.py) bench=("$python" csrc/bench.py)
pytest=("$python" -m pytest -v --continue-on-collection-errors -o faulthandler_timeout=120)
step build "build the fused ops" 180 "$python" csrc/ops.py build
step tests "kernel tests" 150 "${pytest[@]}" -o faulthandler_timeout=40 "${kernels[@]}" -k "cuda or gpu" \
    --junitxml "$out/gpu-kernels.xml" ||        # a kernel that faults takes its process along: each op in its own
    for op in prox_m cfg_c advantage dgpo "step or noise or scale" "layouts or empty or nan"; do
        step tests "  $op" 30 "${pytest[@]}" tests/test_csrc.py -k "cuda and ($op)"
    done
pytest+=(--junitxml "$out/gpu-tests.xml")
if [ "$1" = all ]; then
    step ops "fused ops against eager" 900 "${bench[@]}" --compile --device cuda
    step models "full-size models" 3600 "${bench[@]}" model
    step tests "tests of full-size models" 900 "${pytest[@]}" -s tests/test_gpu.py
    step rewards "rewards, full size" 600 "${bench[@]}" rewards --device cuda
    step models "passes as CUDA graphs" 600 "${bench[@]}" graphs
else
    step ops "fused ops against eager" 60 "${bench[@]}" --quick --device cuda
    step models "full-size models" 140 "${bench[@]}" model --quick
    step tests "tests of full-size models" 240 "${pytest[@]}" -s tests/test_gpu.py -k "not dgpo-flux"
    step rewards "rewards, full size" 60 "${bench[@]}" rewards --quick --device cuda
    step models "passes as CUDA graphs" 45 "${bench[@]}" graphs --quick
fi
printf '\n%-26s %-14s %s\n' step result time
printf '%s\n' "${steps[@]}"
printf '%s' "$failures"
exit $failed

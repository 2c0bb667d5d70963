#!/usr/bin/env bash
# What is measured on a device, in one go, without network: exactness over the families of tests/support/cases.py, spectra, TensorFloat32,
# stages, memory, a profile and the release's procedure, on random weights of the shapes of SmolLM2-135M and Llama-3-8B.
#
#   OUT=folder [DEVICE=cuda] [MODEL=folder of a small Llama] [PYTHON=python3] bash tests/benchmarks/device.sh [--quick]
#
# Small JSON files in $OUT, one a part, written as they are made; six to ten minutes on one GPU. A part that fails or
# takes too long loses itself only; the exit code is that of the worst.
set -u
here=$(cd "$(dirname "$0")" && pwd)
case " $* " in *" --quick "*) default=$(mktemp -d) ;; *) default=$here/results/device ;; esac  # a trial is no result
out=${OUT:-$default}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$here/../..:$here/../support${PYTHONPATH:+:$PYTHONPATH}
export LM_EVAL_COUPLING_NO_HOOK=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
worst=0
# Processes of their own: what breaks a device's context ends only one of them. Seconds at most, then the parts.
while read -r seconds parts; do
    echo "== $parts (at most $seconds s)"
    timeout -k 5 "$seconds" "$python" "$here/device.py" --device "$device" --out "$out" --model "${MODEL:-}" \
        --seconds "$seconds" --parts $parts "$@" </dev/null
    code=$?
    [ $code -gt $worst ] && worst=$code
done <<'PARTS'
150 spectra tf32 small memory profile
100 large
260 exactness
80 release overhead
PARTS
echo "== results in $out"
exit $worst

#!/usr/bin/env bash
# Vectors proven, speed measured, the published table answered and a cost drawn from it, on endpoints that run already.
#
#   BF16=http://127.0.0.1:21000/v1 FP8=http://127.0.0.1:21020/v1 bash benchmarks/gpu/prove.sh MODEL_DIR OUT_DIR [STEP...]
#
# Steps: verify bench sweep seed cost (default: all, in this order; each writes its files as soon as it is done).
# python3 (or $PYTHON) imports the launcher's needs for bench, and sglang, torch and transformers for verify; they may
# come through PYTHONPATH. FP8 may be empty. $DEVICE is cuda, $SECONDS_EACH the length of a load (10).
set -uo pipefail
model=$1 out=$2
shift 2
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
each=${SECONDS_EACH:-10}s
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
status=0

emb() { "$python" -m qwen3emb_launch "$@" || { echo "FAILED ($?): qwen3emb $*"; status=1; }; }
reports() { for ending in json md html; do printf -- '-o %s/%s.%s ' "$out" "$1" "$ending"; done; }

for step in "${@:-verify bench sweep seed cost}"; do
  for one in $step; do
    echo "== $one, $(date -u +%H:%M:%S)"
    case $one in
      verify)
        "$python" "$here/benchmarks/verify_precision.py" --engine-python "$(command -v "$python")" --model "$model" \
          --device "${DEVICE:-cuda}" --endpoint "bfloat16=$BF16" ${FP8:+--endpoint "fp8=$FP8"} \
          --json "$out/verify.json" >"$out/verify.md" || { echo "FAILED ($?): verify_precision.py"; status=1; }
        cat "$out/verify.md"
        ;;
      # shellcheck disable=SC2046  # several words are meant
      bench) emb bench --base-url "$BF16" -c 64 --processes 4 --tokens 33 --rounds 3 -d "$each" $(reports bench) ;;
      sweep) emb bench --base-url "$BF16" --sweep auto --processes 4 --slo p95=100ms -d 5s --warmup 1s $(reports sweep) ;;
      seed) emb bench --base-url "$BF16" --preset seed --processes 4 -d "$each" $(reports seed) ;;
      cost)
        emb cost --bench "$out/sweep.json" --slo p95=100ms --gpu-hour 2.5 --utilisation 0.3 --json >"$out/cost.json"
        emb cost --bench "$out/sweep.json" --slo p95=100ms --gpu-hour 2.5 --utilisation 0.3
        ;;
      *) echo "no step $one"; exit 2 ;;
    esac
  done
done
exit $status

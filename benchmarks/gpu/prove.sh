#!/usr/bin/env bash
# Vectors proven, speed measured, the published table answered, a cost drawn from it, settings tuned: by one command.
#
#   SITE=/opt/engine/site bash benchmarks/gpu/prove.sh MODEL_DIR OUT_DIR [STEP...]         # a GPU host without pip
#   DEVICE=cpu ENGINE=cpu PROFILE=demo bash benchmarks/gpu/prove.sh MODEL_DIR OUT_DIR      # the same on a CPU
#
# Steps: verify bench sweep seed cost tune (default: all, in this order; each writes its files as soon as it is done).
# Endpoints are started by `qwen3emb up` when a step needs them and stopped before `tune` and at the end, unless BF16 and
# FP8 name some that run already (http://HOST:PORT/v1; FP8= leaves float8 out). MODEL_DIR: see make_model.py.
#
#   PYTHON         imports the launcher's needs, which may come through PYTHONPATH (python3)
#   ENGINE         an engine environment by its name; without it ENGINE_PYTHON's (python3) is adopted, and where SITE is
#                  given, a folder of unpacked packages, a venv over that Python which has them
#   PROFILE        h100
#   DEVICE         cuda; cpu leaves float8 out
#   SECONDS_EACH   length of a load (10)
#   BUDGET         of `tune` (12m)
#   PROCESSES      of the load (4)
#   SLO            of sweep, cost and tune (p95=100ms)
set -uo pipefail
model=$(realpath "$1") && mkdir -p "$2" && out=$(realpath "$2") || exit 2
shift 2
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3} profile=${PROFILE:-h100} device=${DEVICE:-cuda} processes=${PROCESSES:-4} slo=${SLO:-p95=100ms}
each=${SECONDS_EACH:-10}s
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export QWEN3EMB_STATE_DIR="$out/state" QWEN3EMB_CACHE_DIR="$out/cache" QWEN3EMB_CONFIG_DIR="$out/config"
engine=${ENGINE:-} engine_python=${ENGINE_PYTHON:-python3}
bf16=${BF16:-} fp8=${FP8:-}
[ -n "${FP8+given}" ] || [ "$device" = cpu ] || fp8=start
started=() status=0

qwen3emb() { "$python" -m qwen3emb_launch "$@"; }
missed() { echo "FAILED ($1): $2" >&2; status=1; }
emb() { qwen3emb "$@" || missed $? "qwen3emb $*"; }
reports() { for ending in json md html; do printf -- '-o %s/%s.%s ' "$out" "$1" "$ending"; done; }

# The environment that engines run in: $engine by name, its interpreter in $engine_python.
environment() {
  [ -n "${ready:-}" ] && return
  if [ -z "$engine" ]; then
    export QWEN3EMB_DATA_DIR="$out/data"
    if [ -n "${SITE:-}" ]; then
      "$engine_python" -m venv --without-pip --system-site-packages "$out/venv" || exit 3
      realpath "$SITE" >"$("$out/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/site.pth"
      engine_python=$out/venv/bin/python
    fi
    engine=prove
    qwen3emb engine install "$device" --python "$(command -v "$engine_python")" --name prove || exit 3
  fi
  engine_python=$(qwen3emb engine list --json | "$python" -c '
import json, sys
print(next(e["python"] for e in json.load(sys.stdin)["result"]["environments"] if e["name"] == sys.argv[1]))' "$engine") || exit 3
  ready=yes
}

# serve NAME [ARGUMENT...]: start an instance and put its URL into $url.
serve() {
  local name=$1 answer
  shift
  environment
  answer=$(qwen3emb up --profile "$profile" --model "$model" --engine "$engine" --name "$name" --port "$port" \
    --no-gateway --no-verify --offline --detach --json "$@") || { missed $? "up $name: $answer"; exit 4; }
  started+=("$name") port=$((port + 1))
  url=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["result"]["base_url"])' "$answer")
}
port=21000

endpoints() {
  [ -n "$bf16" ] || { serve prove-bf16 && bf16=$url; }
  [ "$fp8" != start ] || { serve prove-fp8 --set quantization=fp8 && fp8=$url; }
}

stop() {
  for name in ${started[@]+"${started[@]}"}; do qwen3emb down "$name"; done
  [ ${#started[@]} -eq 0 ] || { bf16='' && { [ -z "$fp8" ] || fp8=start; }; }
  started=()
}
trap stop EXIT

for step in "${@:-verify bench sweep seed cost tune}"; do
  for one in $step; do
    echo "== $one, $(date -u +%H:%M:%S)"
    case $one in verify | bench | sweep | seed) endpoints ;; esac
    case $one in
      verify)
        environment
        "$python" "$here/benchmarks/verify_precision.py" --engine-python "$engine_python" --model "$model" \
          --device "$device" --endpoint "bfloat16=$bf16" ${fp8:+--endpoint "fp8=$fp8"} \
          --json "$out/verify.json" >"$out/verify.md" || missed $? verify_precision.py
        cat "$out/verify.md"
        ;;
      # shellcheck disable=SC2046  # several words are meant
      bench) emb bench --base-url "$bf16" -c 64 --processes "$processes" --tokens 33 --rounds 3 -d "$each" $(reports bench) ;;
      # shellcheck disable=SC2046
      sweep) emb bench --base-url "$bf16" --sweep auto --processes "$processes" --slo "$slo" -d 5s --warmup 1s $(reports sweep) ;;
      # shellcheck disable=SC2046
      seed) emb bench --base-url "$bf16" --preset seed --processes "$processes" -d "$each" $(reports seed) ;;
      cost)
        emb cost --bench "$out/sweep.json" --slo "$slo" --gpu-hour 2.5 --utilisation 0.3 --json >"$out/cost.json"
        emb cost --bench "$out/sweep.json" --slo "$slo" --gpu-hour 2.5 --utilisation 0.3
        ;;
      tune)
        environment
        stop
        rm -f "$out/tuned.yaml"
        emb tune --profile "$profile" --model "$model" --engine "$engine" --slo "$slo" --budget "${BUDGET:-12m}" \
          --processes "$processes" --offline --out "$out/tuned.yaml" --json >"$out/tune.json"
        "$python" -c '
import json, sys
found = json.load(open(sys.argv[1]))
print(found["result"]["sentence"] if found.get("result") else found["error"]["message"])' "$out/tune.json"
        ;;
      *) echo "no step $one"; exit 2 ;;
    esac
  done
done
exit $status

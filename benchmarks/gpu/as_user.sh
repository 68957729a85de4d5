#!/usr/bin/env bash
# Everything a user does on a GPU host, by qwen3emb's own commands, with what each printed kept: for a GPU that no profile
# has evidence for, and for a release.
#
#   bash benchmarks/gpu/as_user.sh MODEL OUT_DIR [STEP...]
#
# MODEL is what `up --model` takes: 4b, or a folder. Steps (default: all, in this order; each can run in a call of its own):
#   doctor up use full bench seed cost restart down replicas tune
# $QWEN3EMB is the command (qwen3emb), $UP more words for every `up` (--profile h100 --offline), $NAME the instance (gpu),
# $BUDGET tune's time (20m), $SECONDS_EACH the length of a load (10).
set -uo pipefail
model=$1 out=$2
shift 2
name=${NAME:-gpu}
each=${SECONDS_EACH:-10}s
read -ra emb <<<"${QWEN3EMB:-qwen3emb}"
read -ra more <<<"${UP:-}"
mkdir -p "$out"
status=0

# run FILE LINES COMMAND...: the output into OUT_DIR/FILE, its last lines and its time shown, a failure remembered.
run() {
  local file=$1 lines=$2 start=${EPOCHREALTIME/[.,]/} code=0
  shift 2
  "${emb[@]}" "$@" >"$out/$file" 2>&1 || code=$?
  printf -- '-- exit %s after %s ms: %s\n' "$code" $(((${EPOCHREALTIME/[.,]/} - start) / 1000)) "qwen3emb $*" | tee -a "$out/times.txt"
  tail -n "$lines" "$out/$file"
  ((code == 0)) || status=1
}

[[ $# -gt 0 ]] || set -- doctor up use full bench seed cost restart down replicas tune
for step in "$@"; do
  echo "== $step, $(date -u +%H:%M:%S)"
  case $step in
    doctor) run doctor.txt 30 doctor ;;
    up) run up.txt 30 up --model "$model" --name "$name" --detach "${more[@]}" ;;
    use)
      run status.txt 15 status "$name"
      run embed.txt 1 embed "What is the capital of China?" --task query --dims 32 --name "$name"
      run quick.txt 12 verify "$name"
      ;;
    full) run full.txt 8 verify "$name" --level full --reference-device "${DEVICE:-cuda}" --report "$out/full.md" --report "$out/full.json" ;;
    bench) run bench.txt 25 bench --name "$name" -c 64 --processes 4 --rounds 3 -d "$each" -o "$out/bench.json" ;;
    seed) run seed.txt 30 bench --name "$name" --preset seed --processes 4 -d "$each" -o "$out/seed.json" -o "$out/seed.md" ;;
    cost) run cost.txt 25 cost --bench "$out/bench.json" --gpu-hour 2.5 --utilisation 0.3 ;;
    restart) run restart.txt 6 restart "$name" ;;
    down) run down.txt 2 down "$name" ;;
    replicas)
      for number in 1 2; do
        run "up-$number.txt" 4 up --model "$model" --name "$name-$number" --replicas "$number" --detach "${more[@]}"
        run "bench-$number.txt" 12 bench --name "$name-$number" -c 256 --processes 4 --rounds 2 -d "$each" -o "$out/bench-$number.json"
        run "down-$number.txt" 1 down "$name-$number"
      done
      ;;
    tune) run tune.txt 40 tune --model "$model" --slo p95=250ms -c 256 --allow-vector-changes --processes 4 --budget "${BUDGET:-20m}" -d 8s --rounds 3 "${more[@]}" --out "$out/tuned.yaml" ;;
    *) echo "no step $step"; exit 2 ;;
  esac
done
exit $status

#!/usr/bin/env bash
# Measures on a machine that can be used for minutes only, and goes on where the last call ended.
#   benchmarks/in_minutes.sh <minutes> <folder> <config>... -- <target, cell or file>...
# <folder>/runs.tar.gz holds the runs measured so far. They are unpacked first, so nothing that has
# ended is trained again; after <minutes> at most they are packed again, without checkpoints.
# Videos and latents are prepared anew on each machine. Exit code 0: all that was asked for is there.
set -euo pipefail
if [[ $# -lt 4 || ! $1 =~ ^[0-9]+$ ]]; then
  sed -n '2,3p' "$0" >&2
  exit 2
fi
seconds=$((60 * $1)) folder=$2
shift 2
configs=()
while [[ $# -gt 0 && $1 != -- ]]; do configs+=("$1"); shift; done
[[ $# -gt 1 ]] || { echo "$0: expected -- and what to measure after the configs" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$folder"
kept=$(realpath "$folder")/runs.tar.gz
[[ -f $kept ]] && tar -xzf "$kept"

# SIGINT: Snakemake ends the run that is under way, which is an attempt cut off, and no result.
status=0
timeout --signal=INT --kill-after=60 "$seconds" \
  snakemake --configfile "${configs[@]}" --keep-going "$@" || status=$?

find results -type f \( -path '*/runs/*' ! -name '*.pt' ! -name output.log \
  -o -path '*/data/manifest.json' \) -print0 |
  tar -czf "$kept.new" --null --files-from=-
mv "$kept.new" "$kept"
measured=$(tar -tzf "$kept" | grep -c 'r[0-9]*/metrics\.json$' || true)
echo "$kept: $measured runs measured (snakemake: $status)"
exit "$status"

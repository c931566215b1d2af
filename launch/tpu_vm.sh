#!/usr/bin/env bash
# Run a module on every worker of a TPU VM or pod slice:
#   launch/tpu_vm.sh NAME ZONE [--dry-run] -- experiments.rto --preset paper --out /mnt/shared/run
# Copies the last commit to ~/rto_jax on each worker, installs it there with [train,tpu], and starts the same command
# on all; --dry-run prints the commands. Needs gcloud, logged in, with a project set. The run ends with this
# connection: start it in tmux, and continue a run that stopped with --resume.
# shellcheck source=launch/env.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

usage="usage: launch/tpu_vm.sh NAME ZONE [--dry-run] -- MODULE [FLAGS]"
names=() dry=""
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --dry-run) dry=1 ;;
    -*) die "unknown flag $1; $usage" ;;
    *) names+=("$1") ;;
  esac
  shift
done
((${#names[@]} == 2 && $# >= 2)) || die "$usage"
shift
check_module "$1"
name=${names[0]} zone=${names[1]}

run() { if [[ $dry ]]; then quoted "$@"; else "$@"; fi; }

[[ $dry ]] || command -v gcloud >/dev/null || die "gcloud (the Google Cloud command line) is not installed"
git -C "$ROOT" rev-parse --verify -q HEAD >/dev/null || die "$ROOT is no git checkout with a commit to copy"
[[ -z $(git -C "$ROOT" status --porcelain) ]] || say "what is not committed is not copied"

# The stock images have Python 3.10; where there is no newer one, uv brings one that needs no root.
remote="mkdir -p rto_jax && tar -xzf rto_jax.tar.gz -C rto_jax && cd rto_jax && . launch/env.sh && \
{ (find_python) || { python3 -m pip install -q --user uv && python3 -m uv python install -q 3.12 && \
export PYTHON=\$(python3 -m uv python find 3.12); }; } && \
install train,tpu && RTO_DISTRIBUTED=1 exec .venv/bin/python -m $(quoted "$@")"

scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
run git -C "$ROOT" archive --format=tar.gz -o "$scratch/rto_jax.tar.gz" HEAD
run gcloud compute tpus tpu-vm scp "$scratch/rto_jax.tar.gz" "$name:" "--zone=$zone" --worker=all
run gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$remote"

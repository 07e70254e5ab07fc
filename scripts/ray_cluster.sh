#!/bin/bash
# A Ray cluster on hosts that ssh reaches, the first one as its head.
#
#   scripts/ray_cluster.sh start node1 node2 node3
#   scripts/ray_cluster.sh status node1
#   scripts/ray_cluster.sh stop node1 node2 node3
#
# Each host needs this folder under the same path, with its environment in .venv (or RFT_VENV). Then,
# on the first host: python -m rft.train ... cluster.address=auto
# Whoever has the head's ~/.ray/auth_token can run programs on all hosts: `start` makes one where
# there is none, and gives it to the others. The head listens on port 6379 (or RFT_PORT).
set -euo pipefail

port=${RFT_PORT:-6379}
ray=${RFT_VENV:-$PWD/.venv}/bin/ray

usage() {
    sed -n 's/^# \{0,1\}//; 2,6p' "$0" >&2
    exit 2
}

# Runs a command on a host; words stay words.
on() {
    local host=$1
    shift
    ssh -o BatchMode=yes "$host" "cd $(printf %q "$PWD") && RAY_AUTH_MODE=token \
        RAY_USAGE_STATS_ENABLED=0 $(printf '%q ' "$@")"
}

(($# >= 2)) || usage
command=$1
shift
case $command in
start)
    token=$(on "$1" "$ray" get-auth-token --generate)
    on "$1" "$ray" start --head --port="$port" --include-dashboard=false
    for host in "${@:2}"; do
        # By standard input, as command lines are open to all on a host.
        on "$host" bash -c 'umask 077; mkdir -p ~/.ray; cat >~/.ray/auth_token' <<<"$token"
        on "$host" "$ray" start --address="$1:$port"
    done
    ;;
status) on "$1" "$ray" status --address="$1:$port" ;;
stop)
    failed=0
    for host in "$@"; do
        on "$host" "$ray" stop || failed=1 # the others are stopped all the same
    done
    exit $failed
    ;;
*) usage ;;
esac

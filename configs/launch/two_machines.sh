#!/usr/bin/env bash
# Two (or more) machines without a scheduler: one command on each, by ssh.
#   HOSTS="node1 node2" ./two_machines.sh purestep train RECIPE output=/shared/runs/mine
# The output folder must be the same one on all of them (NFS, a mounted bucket). The first host coordinates; PORT (8476)
# must be open on it. When a process ends, the others end too (train.heartbeat_timeout) and all are started again.
#   ON='ssh -o BatchMode=yes {host}'   how to run a command on a host; ON='' runs all here (for trying it out)
set -eu
read -ra hosts <<<"${HOSTS:?HOSTS=\"node1 node2\" is needed}"
coordinator=${COORDINATOR:-${hosts[0]}:${PORT:-8476}}
on=${ON-ssh -o BatchMode=yes {host\}}
again=$(cat "$(dirname "$0")/again.sh")
command=$(printf '%q ' "$@")
pids=()
for i in "${!hosts[@]}"; do
  line="cd $(printf '%q' "$PWD") && RESTARTS=${RESTARTS:-20} PAUSE=${PAUSE:-10} JAX_COORDINATOR_ADDRESS=$coordinator"
  line+=" JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$i bash -c $(printf '%q' "$again") again.sh $command"
  if [ -n "$on" ]; then
    read -ra shell <<<"${on//\{host\}/${hosts[$i]}}"
    "${shell[@]}" "$line" &
  else
    bash -c "$line" &
  fi
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"

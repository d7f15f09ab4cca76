#!/usr/bin/env bash
# again.sh COMMAND...   run it again until it ends well: the same command goes on from its last checkpoint.
#   exit code 0: done, or SIGTERM was answered by a save; 2: bad usage, not tried again; anything else: again,
#   at most RESTARTS times (20), PAUSE seconds (10) apart. SIGTERM is handed on to the command, and nothing follows it.
set -u
restarts=${RESTARTS:-20} pause=${PAUSE:-10} stopped=
trap 'stopped=1; [ -n "${child:-}" ] && kill -TERM "$child"' TERM INT
for ((try = 0; ; try++)); do
  "$@" &
  child=$!
  wait "$child"; code=$?
  while [ -n "$stopped" ] && kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
  if [ "$code" = 0 ] || [ "$code" = 2 ] || [ -n "$stopped" ] || [ "$try" -ge "$restarts" ]; then exit "$code"; fi
  echo "again.sh: exit code $code; once more in $pause s ($((try + 1)) of $restarts)" >&2
  sleep "$pause"
done

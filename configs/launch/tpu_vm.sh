#!/usr/bin/env bash
# A Cloud TPU slice: the same command on every worker, by gcloud. The workers find each other by themselves.
#   TPU=my-pod ZONE=us-central2-b ./tpu_vm.sh purestep train pretrain_8b_pod output=/mnt/bucket/runs/8b
# Install it first, once on every worker:
#   gcloud compute tpus tpu-vm ssh $TPU --zone $ZONE --worker=all --command "pip install 'purestep[tpu]'"
# A slice by queued resource, which waits for capacity (preemptible with --spot):
#   gcloud compute tpus queued-resources create $TPU --node-id $TPU --zone $ZONE \
#     --accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5
# The output folder must be one that all workers see: a bucket mounted with gcsfuse, or a local disk for
# checkpoint.local beside it. PURESTEP_JOIN=auto makes the processes join through the TPU's metadata.
set -eu
: "${TPU:?TPU=name of the TPU VM is needed}" "${ZONE:?ZONE= is needed}"
again=$(cat "$(dirname "$0")/again.sh")
line="PURESTEP_JOIN=auto RESTARTS=${RESTARTS:-20} bash -c $(printf '%q' "$again") again.sh $(printf '%q ' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$line"

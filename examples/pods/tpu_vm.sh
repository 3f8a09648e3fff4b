#!/usr/bin/env bash
# A Cloud TPU VM, or a slice of several: the same lines. Needs gcloud, a bucket
# that the VM's service account may write, and ViT-B_16.npz in it.
#
#   REPOSITORY=OWNER/ttc_jax NAME=ttc ZONE=us-west4-a TYPE=v5litepod-8 \
#     BUCKET=my-bucket bash tpu_vm.sh
set -euo pipefail
: "${REPOSITORY:?on GitHub}" "${NAME:=ttc}" "${ZONE:?}" "${TYPE:?as v5litepod-8}" "${BUCKET:?}"
: "${HOSTS:=runs}"  # batch: one run over the whole slice

gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
  --accelerator-type="$TYPE" --version=v2-alpha-tpuv5-lite

# --worker=all: on every host of a slice.
on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$1"
}
on_all "command -v python3.11 || sudo apt-get install -y python3.11-venv
  python3.11 -m venv ttc && ttc/bin/pip install --quiet 'jax[tpu]<0.13' \
  'ttc_jax[hub] @ git+https://github.com/$REPOSITORY'"
on_all "ttc/bin/python -m ttc_jax.main --workdir=gs://$BUCKET/runs/table1 \
  --config=compare:task=vtab,backbone=vit_b16,size=224,epochs=50,\
data=gs://$BUCKET/vtab,weights=gs://$BUCKET/ViT-B_16.npz \
  --config.compilation_cache=gs://$BUCKET/programs --config.hosts=$HOSTS \
  --config.dtype=bfloat16"

# The table so far, on any machine that may read the bucket:
echo "python -m ttc_jax.report gs://$BUCKET/runs/table1"

#!/bin/sh
# Starts Triton Inference Server with the model repository beside this folder; further arguments are the server's.
#
# The model may unload itself, which takes explicit model control. That opens an API through which whoever reaches the server
# could have it run code of theirs: so it is closed, with others that nobody needs here, by a key that nobody is told.
set -eu
repository=$(cd "$(dirname "$0")/.." && pwd)/model_repository
closed=model-repository,shared-memory,trace,logging
key=$(cat /proc/sys/kernel/random/uuid)

exec tritonserver \
    --model-repository="$repository" \
    --model-control-mode=explicit \
    --load-model=diffusiongemma \
    --disable-auto-complete-config \
    --exit-timeout-secs=120 \
    --http-restricted-api="$closed:closed=$key" \
    --grpc-restricted-protocol="$closed:closed=$key" \
    "$@"

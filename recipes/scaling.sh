#!/usr/bin/env bash
# Scaling over the GPUs of one host: the recipe paper-98k-1gpu.yaml on 1, 2, 4, 8 GPUs, under DDP and FSDP2, through the
# switch, so that both phases are timed.
#
#     recipes/scaling.sh SOURCE VALIDATION_SOURCE [GPUS ...]        # GPUS: 1 2 4 8 unless given
#
# Every training has the same global batch, one sequence for each of the most GPUs; fewer GPUs accumulate gradients. All
# start from one seed, so their losses must agree up to the order of sums. Validation reads all of VALIDATION_SOURCE: a
# text or two are enough, if their sequences are a multiple of the most GPUs. Runs go to runs/scaling; at the end
# `lighthouse compare` prints the table: tokens/s of n GPUs over n times those of one is the efficiency.
#
# RUNS: the folder of the runs. STRATEGIES: those of several GPUs, "ddp fsdp2" unless given. FLAGS: more flags for
# `lighthouse fit`, for example to try this on a CPU.
# KILL=1: last, kill one process of a DDP run with SIGKILL, and resume it from its last checkpoint.
set -euo pipefail

source=$1 validation=$2
shift 2
counts=${*:-1 2 4 8}
runs=${RUNS:-runs/scaling}
recipe=$(dirname "$0")/paper-98k-1gpu.yaml
lighthouse=${LIGHTHOUSE:-lighthouse}
most=$(printf '%s\n' $counts | sort -n | tail -n 1)
# multicast over NVLink can take the GPUs of a shared host out of service
export NCCL_NVLS_ENABLE=0
common=(--data.source "$source" --data.validation_source "$validation" --trainer.limit_val_batches 1.0
        --lighthouse.switch_at 8 --trainer.log_every_n_steps 1
        --trainer.logger.init_args.save_dir "$runs" --trainer.logger.init_args.version 0)

# train NAME GPUS STRATEGY [FLAG ...]
train() {
    local name=$1 gpus=$2 strategy=$3
    shift 3
    # as many readers in all, so that each step sees the same sequences
    local flags=(--trainer.devices "$gpus" --trainer.accumulate_grad_batches $((most / gpus))
                 --data.num_workers $((most / gpus)))
    case $strategy in
    ddp) flags+=(--trainer.strategy ddp) ;;
    fsdp2)
        # without sizes all ranks would be one tensor-parallel group
        flags+=(--trainer.strategy.class_path lightning.pytorch.strategies.ModelParallelStrategy
                --trainer.strategy.init_args.data_parallel_size "$gpus"
                --trainer.strategy.init_args.tensor_parallel_size 1)
        ;;
    esac
    # validation every 8 steps, whatever is accumulated
    flags+=(--trainer.val_check_interval $((8 * most / gpus)))
    # shellcheck disable=SC2086
    $lighthouse fit -c "$recipe" "${common[@]}" "${flags[@]}" --trainer.logger.init_args.name "$name" ${FLAGS:-} "$@"
}

folders=()
for gpus in $counts; do
    strategies=${STRATEGIES:-ddp fsdp2}
    [ "$gpus" = 1 ] && strategies=single
    for strategy in $strategies; do
        train "$strategy-$gpus" "$gpus" "$strategy" --trainer.max_steps 16 --trainer.enable_checkpointing false
        folders+=("$runs/$strategy-$gpus/version_0")
    done
done

if [ -n "${KILL:-}" ]; then
    log=$runs/killed.log
    mkdir -p "$runs"
    # it would go on for long
    train killed "$most" ddp --trainer.max_steps 1000 >"$log" 2>&1 &
    trainer=$!
    until [ -e "$runs/killed/version_0/checkpoints/last.ckpt" ]; do
        kill -0 $trainer 2>/dev/null || { tail "$log"; exit 1; }
        sleep 0.05
    done
    for process in $(pgrep -P "$(pgrep -P $trainer)"); do
        # the other children are rank 0's data workers
        if grep -qz '^LOCAL_RANK=1$' "/proc/$process/environ"; then kill -9 "$process"; fi
    done
    status=0
    wait $trainer || status=$?
    echo "one of $most processes killed: the run ended with status $status"
    [ "$status" != 0 ]
    train killed "$most" ddp --trainer.max_steps 16 --ckpt_path last
    folders+=("$runs/killed/version_0")
fi

$lighthouse compare "${folders[@]}"

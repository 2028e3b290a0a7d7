#!/usr/bin/env bash
# Start one node's share of a run: the same command on every node, which works out the rest.
#
#   recipes/launch.sh accelerate_configs/zero3.yaml recipes/dpo.py --config my.yaml            one node
#   NODES="node1 node2" recipes/launch.sh accelerate_configs/zero3-nodes.yaml recipes/dpo.py --config my.yaml
#   sbatch recipes/launch.slurm accelerate_configs/zero3-nodes.yaml recipes/dpo.py --config my.yaml
#
# NODES names all nodes (host names or addresses, or a file with one a line), the same list on each; the first is where
# they meet. Under Slurm the list is the job's, unless NODES is set. A node's rank is its place in the list, the
# processes are its GPUs (with a CPU config: that config's processes, shared out), and the port follows from the list.
# What can be set, if need be:
#   NODE_RANK           this node's place, counted from 0, where its name is not in the list
#   PROCESSES_PER_NODE  instead of its number of GPUs (a config of one process has one, whatever the node has)
#   PORT                where the port that follows from the list is taken
#   START_SECONDS       how long a node waits for the others to start (50)
#
# SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and stop: exit code 75, start again with resume_from_checkpoint: auto (a
# second Ctrl-C does not wait for it). Any other code but 0 is a failure (2: an error line says what to mend; 70: another
# node is gone); a node that fails ends the others within a minute.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

signalled="" launcher=""
on_signal() {
    [ "$signalled$1" != INTINT ] || kill -TERM "$launcher" 2>/dev/null || true
    signalled=$1
    if [ -z "$launcher" ]; then
        echo "stopped by SIG$signalled before the start; start again as before"
        exit 75
    fi
    pkill -USR1 -P "$launcher" || kill -TERM "$launcher" 2>/dev/null || true
}
trap 'on_signal TERM' TERM
trap 'on_signal USR1' USR1
trap 'on_signal INT' INT

[ $# -ge 2 ] || fail "usage: recipes/launch.sh ACCELERATE_CONFIG SCRIPT [--config RECIPE] [--key value …]"
config=$1
shift
[ -f "$config" ] || fail "$config: no such launch config; see accelerate_configs/"
[ -f "$1" ] || fail "$1: no such script"
folder=$(dirname "$0")
has_accelerate='import importlib.util, sys; sys.exit(importlib.util.find_spec("accelerate") is None)'
for python in python python3 "$folder/../.venv/bin/python" ""; do
    ! "$python" -c "$has_accelerate" 2>/dev/null || break
done
[ -n "$python" ] || fail "no python that has accelerate: activate the environment that has it"

# ---------------------------------------------------------------- which nodes, and which of them is this one
if [ -z "${NODES:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null) ||
        fail "no scontrol on $(hostname) that could read the Slurm job's list of nodes, $SLURM_JOB_NODELIST; set NODES"
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}} # without srun no SLURM_NODEID: then by its name
fi
nodes=${NODES:-$(hostname)}
[ ! -f "$nodes" ] || nodes=$(cut -d' ' -f1 "$nodes") # also a hostfile: "node1 slots=8"
read -ra nodes <<<"$(tr ',\n' '  ' <<<"$nodes")"
number=${#nodes[@]}
if [ -z "${NODE_RANK:-}" ]; then
    names=" $(hostname) $(hostname -s) $(hostname -f 2>/dev/null || true) $(hostname -I 2>/dev/null || true) "
    for place in "${!nodes[@]}"; do
        if [[ $names == *" ${nodes[$place]} "* ]]; then
            [ -z "${NODE_RANK:-}" ] || fail "NODES holds this node twice (${nodes[*]}); set NODE_RANK on each"
            NODE_RANK=$place
        fi
    done
    [ -n "${NODE_RANK:-}" ] || fail "none of NODES (${nodes[*]}) is a name or address of this node ($names); set NODE_RANK"
fi
[ "$NODE_RANK" -lt "$number" ] || fail "NODE_RANK $NODE_RANK, but NODES are $number (${nodes[*]})"
# The same on every node without asking one, and another for another list or job.
port=${PORT:-$((20000 + $(cksum <<<"${nodes[*]} ${SLURM_JOB_ID:-}" | cut -d' ' -f1) % 10000))}

# ---------------------------------------------------------------- how many processes on it
setting() { sed -n "s/^ *$1: *\"\{0,1\}\([^ #\"]*\).*/\1/p" "$config"; }
cores=$(nproc)
alone=""
if [ "$(setting distributed_type)" = NO ]; then # accelerate starts one process, whatever number it is given
    alone=yes
    several="$config is for one process; take zero3-nodes.yaml for several nodes, ddp.yaml or zero3.yaml for several GPUs"
    [ "$number" -eq 1 ] || fail "NODES are $number (${nodes[*]}), but $several"
    [ "${PROCESSES_PER_NODE:-1}" -le 1 ] || fail "PROCESSES_PER_NODE is $PROCESSES_PER_NODE, but $several"
fi
if [ -n "${PROCESSES_PER_NODE:-}" ]; then
    processes=$PROCESSES_PER_NODE
elif [ "$(setting use_cpu)" = true ]; then
    all=$(setting num_processes)
    [ $((all % number)) -eq 0 ] || fail "$config: $all processes cannot be shared out to $number nodes; set PROCESSES_PER_NODE"
    processes=$((all / number))
elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    processes=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
else
    processes=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
[ "$processes" -gt 0 ] || fail "no GPU on $(hostname); take accelerate_configs/cpu.yaml or zero3-cpu.yaml to run without"
if [ "$alone" ] && [ "$(setting use_cpu)" != true ]; then
    [ "$processes" -eq 1 ] || echo "note: $config uses one of $processes GPUs; ddp.yaml and zero3.yaml use all"
    processes=1
    gpus=${CUDA_VISIBLE_DEVICES:-0}
    export CUDA_VISIBLE_DEVICES=${gpus%%,*} # all that one process sees, transformers puts to use by nn.DataParallel
fi
if [ "$number" -gt 1 ] && [ "$(setting distributed_type)" = DEEPSPEED ]; then
    [ "$(setting deepspeed_multinode_launcher)" = standard ] ||
        fail "$config: over several nodes it needs deepspeed_multinode_launcher: standard; take zero3-nodes.yaml"
fi
# What torch's launcher would try again for minutes, or explain in sixty lines.
first=${nodes[0]}
if [ "$number" -gt 1 ]; then
    getent ahosts "$first" >/dev/null || fail "the first of NODES, $first, is no name that $(hostname) knows; correct NODES"
    answer=$([ "$NODE_RANK" -eq 0 ] || LC_ALL=C timeout 5 bash -c "</dev/tcp/$first/$port" 2>&1 || true)
    [[ ! $answer =~ (No route|unreachable) ]] || fail "no way from $(hostname) to the first of NODES, $first (${answer##*: })"
fi
if [ "$NODE_RANK" -eq 0 ] && [ $((number * processes)) -gt 1 ] && (: </dev/tcp/"$first"/"$port") 2>/dev/null; then
    fail "port $port of $first is taken; set PORT to another, the same on every node"
fi
# torch's launcher would give each process one thread, which starves an optimizer on the CPU.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}

echo "node $NODE_RANK of $number ($(hostname)): $processes processes, $((number * processes)) in all, at $first:$port"
export START_SECONDS=${START_SECONDS:-50}
did_not_meet() {
    fail "the nodes (${nodes[*]}) did not meet at $first:$port in $START_SECONDS s; start the same command on each of them"
}
until [ "$NODE_RANK" -eq 0 ] || timeout 5 bash -c "</dev/tcp/$first/$port" 2>/dev/null; do
    [ "$SECONDS" -lt "$START_SECONDS" ] || did_not_meet # torch's launcher would wait for twice the time
    sleep 0.2
done

# ---------------------------------------------------------------- start it, pass signals on, end all of it together
export LAUNCH_EXIT_CODE # a file that processes make when they start, and leave their code in: accelerate makes a 1 of all
LAUNCH_EXIT_CODE=$(mktemp --dry-run)
guard=()
command -v setpriv >/dev/null && guard=(setpriv --pdeathsig TERM) # if this script is killed, what it started ends
# A session of its own: a signal to this script's group must not reach accelerate, which would give its processes 30 s
# to end, too few to save a large model.
setsid "${guard[@]}" "$python" "$folder/core/runtime/accelerate_launch.py" --config_file "$config" --num_machines "$number" \
    --num_processes $((number * processes)) --machine_rank "$NODE_RANK" --main_process_ip "$first" \
    --main_process_port "$port" --rdzv_conf "timeout=$START_SECONDS" "$@" &
launcher=$!
trap 'kill -TERM $launcher 2>/dev/null || true' HUP

status=0
while :; do
    wait "$launcher" && status=0 || status=$?
    kill -0 "$launcher" 2>/dev/null || break # else: `wait` was interrupted by a signal
done
if [ "$status" -gt 128 ]; then # interrupted just as the launcher ended, perhaps: bash has kept its code
    wait "$launcher" && status=0 || status=$?
fi
if [ "$status" -ne 0 ] && [ "$signalled" ] && [ ! -e "$LAUNCH_EXIT_CODE" ]; then # no process was there to answer it
    echo "stopped by SIG$signalled before the start; start again as before"
    status=75
elif [ "$status" -ne 0 ] && [ ! -e "$LAUNCH_EXIT_CODE" ] && [ "$number" -gt 1 ] && [ "$SECONDS" -ge "$START_SECONDS" ]; then
    did_not_meet
fi
[ ! -s "$LAUNCH_EXIT_CODE" ] || status=$(cat "$LAUNCH_EXIT_CODE")
rm -f "$LAUNCH_EXIT_CODE"
[ "$status" -eq 0 ] || echo "node $NODE_RANK of $number ($(hostname)) ended with exit code $status" >&2
# Slurm ends the other nodes with the first: leave them the time to come to the same end.
[ "$status" -ne 75 ] || sleep 2
exit "$status"

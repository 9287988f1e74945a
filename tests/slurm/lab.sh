#!/usr/bin/env bash
# A real Slurm on one machine, to try batch scripts without a cluster.
#
#   tests/slurm/lab.sh start DIR    start two nodes, n1 and n2, with all their files in DIR
#   . DIR/env                       then use sinfo, srun, sbatch, ...
#   tests/slurm/lab.sh stop DIR     end what was started; the logs in DIR/log stay
#
# Each node claims 4 CPUs and 2 GPUs, whatever the machine has. They are only counted: placement and --gpus-per-node
# can be tried, and CUDA cannot. Neither systemd nor cgroups are used. MPI starts with --mpi=pmi2 (MPICH).
# Slurm is installed with apt when it is missing and the caller is root.
set -euo pipefail

NODES=(n1 n2)
CPUS=4                          # per node
GPUS=(/dev/null /dev/zero)      # per node: Slurm asks for devices, and any will do
DAEMONS=(munged slurmctld)      # and one slurmd per node: each has a file DIR/run/NAME.pid
for node in "${NODES[@]}"; do
    DAEMONS+=("slurmd.$node")
done

PATH=$PATH:/usr/sbin:/sbin      # where Debian keeps the daemons, and not every user looks
unset "${!SLURM@}" "${!SBATCH@}" "${!SRUN@}"  # of a Slurm job that this may run in

die() {
    echo "lab.sh: $*" >&2
    exit 1
}

# Is this process one of ours? After a crash its number may belong to another process. Not in a zombie: no command line.
is_ours() {
    { tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null | grep --quiet --fixed-strings "$lab/"
}

# Print the process of a daemon, if it runs. A daemon that ends removes its file, at any moment.
pid_of() {
    local pid
    { read -r pid <"$lab/run/$1.pid"; } 2>/dev/null && is_ours "$pid" && echo "$pid"
}

# wait_for SECONDS COMMAND...: succeed as soon as COMMAND does.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.2
    done
}

# --- start

install_slurm() {
    local program missing=
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || missing+=" $program"
    done
    [[ -n $missing ]] || return 0
    ((EUID == 0)) || die "not found:$missing. Install Slurm and MUNGE, or run this as root."
    command -v apt-get >/dev/null || die "not found:$missing, and no apt-get to install Slurm and MUNGE with."
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
        slurm-wlm slurm-wlm-basic-plugins munge >/dev/null
}

# Print the first of several consecutive ports of which none is in use, so that a second lab can run beside.
free_ports() {
    local count=$1 first port
    for ((first = 17817; first < 18817; first += 100)); do
        for ((port = first; port < first + count; port++)); do
            # Connecting fails where nobody listens.
            ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
        done
        echo "$first"
        return
    done
    die "no free ports from 17817 on."
}

write_configuration() {
    local host port gpu node
    host=$(hostname -s)
    port=$(free_ports $((1 + ${#NODES[@]})))
    cat >"$lab/slurm.conf" <<END
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$lab/run/munge.sock
CredType=cred/munge
# MPICH names its shared memory after the job, and that of a killed job stays: a job of the same number, of a later lab,
# could not start.
FirstJobId=$(($(date +%s) % 60000000 + 1))
StateSaveLocation=$lab/state
SlurmctldPidFile=$lab/run/slurmctld.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdPidFile=$lab/run/slurmd.%n.pid
SlurmdLogFile=$lab/log/slurmd.%n.log
SlurmdSpoolDir=$lab/spool/%n
# Believe the CPUs and the memory stated below, instead of draining the nodes.
SlurmdParameters=config_overrides
# Nothing that needs cgroups, an accounting database or a real network.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
# As on a cluster that sets no default: a script must name its --mpi.
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Look at the queue at once (interval in microseconds), and every 2 seconds at least.
SchedulerParameters=sched_min_interval=100000,sched_interval=2,bf_interval=2
KillWait=5
ReturnToService=2
# Limits of the submitting shell are not this lab's business, and fail where they are above the hard ones.
PropagateResourceLimits=NONE
GresTypes=gpu
END
    : >"$lab/gres.conf"
    for node in "${NODES[@]}"; do
        port=$((port + 1))
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port" \
            "CPUs=$CPUS RealMemory=1000 Gres=gpu:${#GPUS[@]}" >>"$lab/slurm.conf"
        for gpu in "${GPUS[@]}"; do
            echo "NodeName=$node Name=gpu File=$gpu" >>"$lab/gres.conf"
        done
    done
    echo "PartitionName=main Nodes=$(IFS=,; echo "${NODES[*]}") Default=YES MaxTime=60 DefaultTime=5" \
        >>"$lab/slurm.conf"
    cat >"$lab/env" <<END
export SLURM_CONF=$lab/slurm.conf
END
}

nodes_are_idle() {
    [[ $(timeout 5 sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | sort -u | wc -l) == "${#NODES[@]}" ]]
}

start() {
    local name running=0 node
    if [[ -d $lab && ! -e $lab/.slurm-lab && -n $(ls -A "$lab") ]]; then
        die "$lab holds other files. Name a directory that is empty or does not exist."
    fi
    for name in "${DAEMONS[@]}"; do
        ! pid_of "$name" >/dev/null || running=$((running + 1))
    done
    if ((running == ${#DAEMONS[@]})); then
        echo "Slurm already runs here. To use it: . $lab/env"
        return
    fi
    ((running == 0)) || stop  # the rest of a lab that was damaged
    install_slurm

    # Start afresh: state of an earlier lab names jobs that no longer run.
    rm -rf "${lab:?}"/{state,spool,run,log}
    mkdir -p "$lab"/{state,spool,run,log}
    touch "$lab/.slurm-lab"
    (umask 077 && head --bytes=1024 /dev/urandom >"$lab/run/munge.key")
    write_configuration
    # shellcheck source=/dev/null
    . "$lab/env"

    # --force: warn, rather than refuse, where a parent directory is writable by others, as /tmp is.
    munged --force --socket="$lab/run/munge.sock" --key-file="$lab/run/munge.key" --pid-file="$lab/run/munged.pid" \
        --seed-file="$lab/run/munge.seed" --log-file="$lab/log/munged.log" 2>/dev/null
    # Descriptors above 2 are closed: a daemon would keep a caller's lock or pipe open.
    slurmctld -f "$SLURM_CONF" 3>&- 4>&- 5>&-
    for node in "${NODES[@]}"; do
        mkdir -p "$lab/spool/$node"
        slurmd -N "$node" -f "$SLURM_CONF" 3>&- 4>&- 5>&-
    done
    if ! wait_for 30 nodes_are_idle; then
        tail --lines=5 "$lab"/log/*.log >&2
        stop
        die "the nodes did not come up within 30 seconds; the logs are in $lab/log."
    fi
    timeout 5 sinfo --Node --format="%N %T %c %G"
    cat <<END
Slurm is up. To use it:   . $lab/env
for example:              srun --nodes=2 --ntasks=4 --label printenv SLURMD_NODENAME
To end it:                $0 stop $lab
END
}

# --- stop

no_jobs() {
    [[ -z $(timeout 5 squeue --noheader --format=%A 2>/dev/null) ]]
}

has_ended() {
    ! is_ours "$1"
}

stop() {
    local name pid
    if [[ ! -e $lab/.slurm-lab ]]; then
        echo "No Slurm was started in $lab."
        return
    fi
    export SLURM_CONF=$lab/slurm.conf
    # Jobs first: the processes of a job outlive a slurmd that is ended before them.
    if pid_of slurmctld >/dev/null && ! no_jobs; then
        timeout 5 scancel --user="$(id -un)" || true
        wait_for 20 no_jobs || echo "lab.sh: jobs still run; their processes may stay behind." >&2
    fi
    # In reverse: the slurmd, then what they talk to.
    for ((i = ${#DAEMONS[@]} - 1; i >= 0; i--)); do
        name=${DAEMONS[i]}
        if pid=$(pid_of "$name"); then
            kill "$pid" 2>/dev/null || true
            wait_for 10 has_ended "$pid" || kill -KILL "$pid" 2>/dev/null || true
        fi
        rm -f "$lab/run/$name.pid"
    done
    echo "Slurm in $lab has ended."
}

[[ $# == 2 && $1 == @(start|stop) ]] || die "usage: lab.sh start|stop DIR"
lab=$(realpath --canonicalize-missing "$2")
[[ $lab != *[[:space:]]* ]] || die "$lab: slurm.conf knows no blanks in a path."
"$1"

#!/usr/bin/env bash
# A Slurm of one node on this machine, with its own munge; nothing outside DIR is touched.
#
#   slurm.sh up DIR      starts it; DIR is a new folder with a short path
#   slurm.sh run DIR COMMAND...   runs sbatch, squeue, scontrol, … against it
#   slurm.sh down DIR    cancels all jobs, ends the daemons and removes DIR
#
# Needs root, slurm-wlm and munge.
set -euo pipefail
action=$1 dir=$2
export SLURM_CONF=$dir/slurm.conf
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

up() {
    mkdir "$dir"
    mkdir "$dir/state" "$dir/spool"
    dd if=/dev/urandom of="$dir/munge.key" bs=128 count=1 status=none
    chmod 600 "$dir/munge.key"
    /usr/sbin/munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    cat >"$SLURM_CONF" <<-END
		ClusterName=being-vl
		SlurmctldHost=$(hostname -s)(127.0.0.1)
		SlurmctldPort=$(free_port)
		SlurmdPort=$(free_port)
		SlurmUser=root
		AuthType=auth/munge
		# Slurm lets a job's credentials expire, two minutes by default, before a job queued again may start.
		AuthInfo=socket=$dir/munge.socket,cred_expire=5
		StateSaveLocation=$dir/state
		SlurmdSpoolDir=$dir/spool
		SlurmctldPidFile=$dir/slurmctld.pid
		SlurmdPidFile=$dir/slurmd.pid
		SlurmctldLogFile=$dir/slurmctld.log
		SlurmdLogFile=$dir/slurmd.log
		ProctrackType=proctrack/linuxproc
		TaskPlugin=task/none
		SelectType=select/cons_tres
		SchedulerParameters=bf_interval=1,sched_interval=1
		KillWait=5
		MailProg=/bin/true
		NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
		PartitionName=all Nodes=ALL Default=YES State=UP
	END
    /usr/sbin/slurmctld
    /usr/sbin/slurmd
    for _ in $(seq 50); do
        [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ] && return 0
        sleep 0.2
    done
    tail -n 5 "$dir"/*.log >&2
    return 1
}

down() {
    scancel --user=root 2>/dev/null || true
    for _ in $(seq 100); do # until slurmd has ended the jobs' processes
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 0.2
    done
    for daemon in slurmd slurmctld munged; do
        [ -f "$dir/$daemon.pid" ] && kill "$(cat "$dir/$daemon.pid")" || true
    done
    for _ in $(seq 50); do
        ls "$dir"/*.pid >/dev/null 2>&1 || break
        sleep 0.1
    done
    rm -rf "$dir" || { sleep 2; rm -rf "$dir"; } # a daemon may write its state as it ends
}

case $action in
up) up || { down; exit 1; } ;;
run) exec "${@:3}" ;;
down) down ;;
*) echo "slurm.sh up|run|down DIR" >&2; exit 2 ;;
esac

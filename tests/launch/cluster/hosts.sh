#!/usr/bin/env bash
# Two hosts on this machine: network namespaces joined by a cable, each with an sshd that lets root in.
#
#   hosts.sh up DIR      makes them; DIR is a new folder for keys, settings and hostfile
#   hosts.sh run DIR N COMMAND...   runs a command on host N, 0 or 1
#   hosts.sh down DIR    ends every process in them and takes them away
#
# Needs root and iproute2; openssh-server for `ssh -F DIR/ssh_config 10.77.0.1` and pdsh.
set -euo pipefail
action=$1 dir=$2
name() { echo "being-vl-$(basename "$dir")-$1"; }
address() { echo "10.77.0.$(($1 + 1))"; }

up() {
    mkdir "$dir"
    for n in 0 1; do
        ip netns add "$(name $n)"
        ip -n "$(name $n)" link set lo up
    done
    ip link add eth0 netns "$(name 0)" type veth peer name eth0 netns "$(name 1)"
    for n in 0 1; do
        ip -n "$(name $n)" address add "$(address $n)/24" dev eth0
        ip -n "$(name $n)" link set eth0 up
        echo "$(address $n) slots=1" >>"$dir/hostfile"
    done
    command -v /usr/sbin/sshd >/dev/null || return 0
    mkdir -p /run/sshd # where Debian's sshd goes into its cage
    ssh-keygen -q -t ed25519 -N '' -f "$dir/key"
    cat >"$dir/ssh_config" <<-END
		IdentityFile $dir/key
		StrictHostKeyChecking no
		UserKnownHostsFile /dev/null
		LogLevel ERROR
	END
    for n in 0 1; do
        cat >"$dir/sshd_config_$n" <<-END
			ListenAddress $(address $n)
			HostKey $dir/key
			AuthorizedKeysFile $dir/key.pub
			StrictModes no
			PermitRootLogin prohibit-password
			PidFile $dir/sshd_$n.pid
			UsePAM no
		END
        ip netns exec "$(name $n)" /usr/sbin/sshd -f "$dir/sshd_config_$n"
    done
}

down() {
    for n in 0 1; do
        ip netns list | grep -q "^$(name $n)\b" || continue
        ip netns pids "$(name $n)" | xargs --no-run-if-empty kill -9
        ip netns delete "$(name $n)"
    done
    rm -rf "$dir"
}

case $action in
up) up || { down; exit 1; } ;;
run) exec ip netns exec "$(name "$3")" "${@:4}" ;;
down) down ;;
*) echo "hosts.sh up|run|down DIR" >&2; exit 2 ;;
esac

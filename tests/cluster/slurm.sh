#!/usr/bin/env bash
# A Slurm of several nodes on one machine, for the tests of `make test-cluster` and to try things by hand:
#   slurm.sh up [NODES]            the host `head` (slurmctld, slurmdbd, munge, mariadb) and node0, node1, ...; 2 by default
#   slurm.sh at HOST COMMAND...    run a command on one of them, as by ssh: slurm.sh at head sinfo
#   slurm.sh crash HOST            kill all that runs on it, as if it had lost its power
#   slurm.sh boot HOST             start a node's slurmd again
#   slurm.sh down                  end it, also what is left of one that crashed, and delete its folder
# As root, on Debian or Ubuntu with slurm-wlm, slurmdbd, munge, mariadb-server and iproute2.
#   CLUSTER     the folder with all of its files; /var/tmp/hilorec-slurm by default. Each folder is a cluster of its own
#   BF_INTERVAL seconds between the scheduler's looks at heterogeneous jobs; 2, where Slurm takes 30
#   ACCOUNTING  "no" leaves out slurmdbd and mariadb, so that sacct knows nothing
#
# Hosts are network namespaces with host names, /etc/hosts and /etc/slurm of their own, joined by a switch. Whatever runs
# in them is the cluster's, and nothing else: addresses and ports are theirs alone, and a Slurm of this machine is
# neither seen nor touched.
set -euo pipefail

cluster=$(realpath -m "${CLUSTER:-/var/tmp/hilorec-slurm}")
prefix=hrs$(cksum <<<"$cluster" | cut -d' ' -f1)
tools="slurmctld slurmd slurmdbd sacctmgr munged mariadbd mariadb-install-db ip unshare"

fail() { echo "error: $*" >&2 && exit 1; }
say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }
spaces() { ip netns list | cut -d' ' -f1 | grep "^$prefix-" || true; }

# enter HOST COMMAND...: becomes that command on the host, in a session of its own if `session` is setsid.
enter() {
	local host=$1
	shift
	exec ${session:-} ip netns exec "$prefix-$host" unshare --uts --mount sh -ec '
		hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/etc" /etc/slurm; shift 2; exec "$@"
	' sh "$host" "$cluster" "$@"
}

# daemon NAME HOST COMMAND...: started so that Ctrl-C in its terminal does not end it.
daemon() {
	local name=$1 session=setsid
	shift
	(enter "$@") >"$cluster/log/$name.out" 2>&1 </dev/null &
	disown
}

# await SECONDS WHAT COMMAND...: until the command succeeds.
await() {
	local until=$((SECONDS + $1)) what=$2
	shift 2
	until ("$@") >/dev/null 2>&1; do
		((SECONDS < until)) || fail "$what; $cluster/log has what its daemons say"
		sleep 0.3
	done
}

configure() {
	local nodes=$1 node
	mkdir -p "$cluster"/{etc,log,munge,mariadb,state,spool}
	for ((node = 0; node < nodes; node++)); do mkdir "$cluster/spool/node$node"; done
	touch "$cluster/of-hilorec"
	chmod 755 "$cluster" "$cluster/munge"
	(umask 077 && head -c 1024 /dev/urandom >"$cluster/munge/key")
	{
		echo "127.0.0.1 localhost"
		echo "10.78.0.254 head"
		for ((node = 0; node < nodes; node++)); do echo "10.78.0.$((node + 1)) node$node"; done
	} >"$cluster/hosts"
	# Nodes say that they have more CPUs and memory than this machine, so that two jobs fit on each. A requeued job starts
	# once the credentials of the first start have expired: after 120 s, if they are not told to do so earlier.
	cat >"$cluster/etc/slurm.conf" <<-END
		ClusterName=hilorec
		SlurmctldHost=head
		SlurmUser=root
		AuthType=auth/munge
		AuthInfo=socket=$cluster/munge/socket,cred_expire=20
		StateSaveLocation=$cluster/state
		SlurmdSpoolDir=$cluster/spool/%n
		SlurmctldLogFile=$cluster/log/slurmctld.log
		SlurmdLogFile=$cluster/log/slurmd-%n.log
		SlurmctldPidFile=$cluster/state/slurmctld.pid
		SlurmdPidFile=$cluster/spool/%n.pid
		ProctrackType=proctrack/linuxproc
		TaskPlugin=task/none
		SelectType=select/cons_tres
		SelectTypeParameters=CR_Core_Memory
		SchedulerParameters=bf_interval=${BF_INTERVAL:-2}
		SlurmdParameters=config_overrides
		SlurmdTimeout=20
		ReturnToService=2
		$(if [[ "${ACCOUNTING:-}" != no ]]; then
			echo "AccountingStorageType=accounting_storage/slurmdbd"
			echo "AccountingStorageHost=head"
			echo "AccountingStoragePass=$cluster/munge/socket" # whereby slurmdbd is reached
		fi)
		NodeName=node[0-$((nodes - 1))] CPUs=8 RealMemory=20000
		PartitionName=train Default=YES Nodes=ALL MaxTime=1:00:00
	END
	echo "CgroupPlugin=cgroup/v1" >"$cluster/etc/cgroup.conf" # looked at even where nothing of it is used
	(umask 077 && cat >"$cluster/etc/slurmdbd.conf") <<-END
		DbdHost=head
		SlurmUser=root
		AuthType=auth/munge
		AuthInfo=socket=$cluster/munge/socket
		LogFile=$cluster/log/slurmdbd.log
		PidFile=$cluster/state/slurmdbd.pid
		StorageType=accounting_storage/mysql
		StorageHost=127.0.0.1
		StorageUser=root
		StorageLoc=slurm
	END
}

connect() {
	local switch=$prefix-net host
	for host in net "$@"; do
		ip netns add "$prefix-$host" || fail "network namespaces cannot be made here"
		ip -n "$prefix-$host" link set lo up
	done
	ip -n "$switch" link add switch type bridge
	ip -n "$switch" link set switch up
	for host in "$@"; do
		ip -n "$switch" link add "to-$host" type veth peer name eth0 netns "$prefix-$host"
		ip -n "$switch" link set "to-$host" up master switch
		ip -n "$prefix-$host" addr add "$(awk -v host="$host" '$2 == host {print $1}' "$cluster/hosts")/24" dev eth0
		ip -n "$prefix-$host" link set eth0 up
	done
}

up() {
	local nodes=${1:-2} node hosts=(head)
	[[ "$nodes" =~ ^[1-9][0-9]?$ ]] || fail "NODES is \"$nodes\"; it must be a number from 1 to 99"
	if ready "$nodes"; then
		echo "$cluster is up already"
		return
	fi
	[[ ! -e "$cluster" || -e "$cluster/of-hilorec" ]] || fail "$cluster is there, and no cluster of this script: set CLUSTER"
	down
	configure "$nodes"
	for ((node = 0; node < nodes; node++)); do hosts+=("node$node"); done
	connect "${hosts[@]}"
	daemon munged head munged --foreground --force --num-threads=2 --key-file="$cluster/munge/key" --socket="$cluster/munge/socket" \
		--pid-file="$cluster/munge/pid" --log-file="$cluster/log/munged.log" --seed-file="$cluster/munge/seed"
	await 20 "munged does not answer" munge --no-input --socket="$cluster/munge/socket"
	if [[ "${ACCOUNTING:-}" != no ]]; then
		mariadb-install-db --no-defaults --user=root --datadir="$cluster/mariadb" --auth-root-authentication-method=normal \
			--skip-test-db >"$cluster/log/mariadb-install.out" 2>&1 || fail "mariadb-install-db: see $cluster/log"
		daemon mariadbd head mariadbd --no-defaults --user=root --datadir="$cluster/mariadb" --bind-address=127.0.0.1 \
			--socket="$cluster/mariadb/socket" --pid-file="$cluster/mariadb/pid" --innodb-buffer-pool-size=64M
		await 60 "mariadbd does not answer" mariadb-admin --no-defaults --user=root --socket="$cluster/mariadb/socket" ping
		daemon slurmdbd head slurmdbd -D
		await 60 "slurmdbd does not answer" enter head sacctmgr -i add cluster hilorec
	fi
	daemon slurmctld head slurmctld -D
	for ((node = 0; node < nodes; node++)); do daemon "slurmd-node$node" "node$node" slurmd -D -N "node$node"; done
	await 60 "nodes do not come up" ready "$nodes"
	say "$cluster is up: head and $nodes nodes, with $(slurmd -V)"
}

# ready NODES: all of them are there and idle, or at work.
ready() {
	[[ -e "$cluster/of-hilorec" && -n "$(spaces)" ]] || return 1
	(($( (enter head timeout 20 sinfo --noheader --Node --states=idle,mixed,allocated --format=%N) 2>/dev/null | sort -u | wc -l) == $1))
}

down() {
	local space signal
	for signal in TERM TERM KILL; do
		for space in $(spaces); do
			# shellcheck disable=SC2046
			kill -$signal $(ip netns pids "$space") 2>/dev/null || true
		done
		for _ in $(seq 20); do
			[[ -n "$(for space in $(spaces); do ip netns pids "$space"; done)" ]] || break
			sleep 0.3
		done
	done
	for space in $(spaces); do ip netns del "$space"; done
	[[ ! -e "$cluster/of-hilorec" ]] || rm -rf --one-file-system "$cluster"
}

(($(id -u) == 0)) || fail "hosts of its own take root"
for tool in $tools; do
	command -v "$tool" >/dev/null ||
		fail "$tool is not installed; on Debian and Ubuntu: apt install slurm-wlm slurmdbd munge mariadb-server iproute2 util-linux"
done
case "${1:-}" in
up) up "${@:2}" ;;
at)
	(($# > 2)) || fail "usage: slurm.sh at HOST COMMAND..."
	[[ -e "/run/netns/$prefix-$2" ]] || fail "$cluster has no host $2; slurm.sh up makes it"
	enter "${@:2}"
	;;
crash)
	# shellcheck disable=SC2046
	kill -KILL $(ip netns pids "$prefix-${2:?usage: slurm.sh crash HOST}")
	;;
boot) daemon "slurmd-${2:?usage: slurm.sh boot HOST}" "$2" slurmd -D -N "$2" ;;
down) down ;;
*) fail "usage: slurm.sh up [NODES] | at HOST COMMAND... | crash HOST | boot HOST | down" ;;
esac

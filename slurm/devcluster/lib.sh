# shellcheck shell=bash disable=SC2154 # dir is the sourcing script's
# What up and down share. Sourced, never run.

link=/etc/slurm/slurm.conf # where Debian's commands look when SLURM_CONF is not set
lock=/run/d2m-devcluster.lock
default_dir=/var/lib/d2m-devcluster

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# An up and a down at once would undo each other's work. -o: the daemons must not inherit the lock.
take_lock() {
    [ "$(id -u)" = 0 ] || die "must run as root: it starts Slurm's daemons"
    [ -n "${D2M_DEVCLUSTER_LOCKED:-}" ] ||
        exec env D2M_DEVCLUSTER_LOCKED=1 flock -o "$lock" "$0" "$@"
}

# The folder of the cluster that the commands of this machine talk to, or the default one.
current_dir() {
    local conf
    conf=$(readlink "$link" || true)
    if [ -e "${conf%/etc/slurm.conf}/.d2m-devcluster" ]; then
        echo "${conf%/etc/slurm.conf}"
    else
        echo "$default_dir"
    fi
}

# Slurm's files cannot quote, and down removes this folder.
check_dir() {
    [[ $dir =~ ^/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)+$ ]] ||
        die "--dir $dir: only letters, digits and ._- in its path, and not directly under /"
    [ ! -L "$dir" ] || die "--dir $dir is a link"
    [ ! -e "$dir" ] || [ -O "$dir" ] || die "--dir $dir belongs to another user"
    [ ! -e "$dir" ] || [ -e "$dir/.d2m-devcluster" ] || [ -z "$(ls -A "$dir")" ] ||
        die "--dir $dir holds something else"
}

# wait_for SECONDS COMMAND...
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}

# Of pids on standard input those to which dir is this folder: not those of a container's devcluster.
here() {
    local pid
    while read -r pid; do
        if [ "/proc/$pid/ns/mnt" -ef /proc/self/ns/mnt ]; then echo "$pid"; fi
    done
}

# The daemons' pids, told by a variable that up puts into their environment: pid files get stale.
daemons() {
    local pid
    grep -slzxF "D2M_DEVCLUSTER=$dir" /proc/[0-9]*/environ | cut -d/ -f3 | here | while read -r pid; do
        if [ $# = 0 ] || [ "$(tr '\0' ' ' <"/proc/$pid/cmdline")" = "$* " ]; then echo "$pid"; fi
    done 2>/dev/null || true # a process may end meanwhile
}

#!/usr/bin/env bash
# Runs one RabbitMQ node, with the settings in its environment, as long as it is needed, and leaves nothing behind.
#
#   broker.sh private DIR          until standard input ends; before that, a line `stop` stops it gracefully and `kill` at once,
#                                  and both keep its data in DIR
#   broker.sh shared DIR LEASE     until the file LEASE has not been locked for half a minute; then LEASE.ready is removed, too;
#                                  meanwhile LEASE.supervised is locked
#
# SERVER is the program that starts a node. Each of the two jobs below has its own process group, so that it can be killed as a whole.
set -u -m
mode=$1
dir=$2
idle_limit=30

# Removes what killed supervisors have left: processes with their directory in the environment, and the directory.
if [ "$mode" = shared ]; then
    for old in "$(dirname "$dir")"/node-*; do
        [ -d "$old" ] && [ "$old" != "$dir" ] || continue
        for pid in $(cat "$old/pids" 2>/dev/null); do
            grep -qzF "HOME=$old" "/proc/$pid/environ" 2>/dev/null && kill -KILL -- "-$pid"
        done
        rm -rf "$old"
    done
fi

epmd -address 127.0.0.1 -port "$ERL_EPMD_PORT" >"$dir/epmd.log" 2>&1 </dev/null &
epmd=$!
"$SERVER" >"$dir/console.log" 2>&1 </dev/null &
node=$!
echo "$node $epmd" >"$dir/pids"

keep=no
finish() {
    kill -KILL -- "-$node" "-$epmd" 2>/dev/null
    wait
    rm -f "$dir/pids"
    [ "$keep" = yes ] || rm -rf "$dir"
}
trap finish EXIT
trap exit TERM INT HUP

case $mode in
private)
    # The node may also fail to start: the test sees that this script ends, and finds its logs in place.
    while kill -0 "$node" 2>/dev/null; do
        if read -r -t 1 line; then
            keep=yes
            [ "$line" = stop ] && kill -TERM "$node" && wait "$node"
            exit 0
        elif [ $? -le 128 ]; then
            exit 0
        fi
    done
    keep=yes
    exit 1
    ;;
shared)
    # After the node was started, which must not hold these locks. The first shows that this supervisor is alive.
    exec 8>"$3.supervised" 9<>"$3"
    flock -xn 8 || exit 1
    used=$(date +%s)
    while kill -0 "$node" 2>/dev/null; do
        sleep 1 8>&- 9>&-
        touched=$(stat -c %Y "$3")
        [ "$touched" -gt "$used" ] && used=$touched
        if ! flock -xn 9; then
            used=$(date +%s)
            continue
        fi
        # A test that starts now waits for the lock until this is decided.
        if [ $(($(date +%s) - used)) -ge "$idle_limit" ]; then
            rm -f "$3.ready"
            exit 0
        fi
        flock -u 9
    done
    keep=yes
    exit 1
    ;;
esac

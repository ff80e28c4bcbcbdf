#!/usr/bin/env bash
# Keeps one RabbitMQ node, with the settings in its environment, as long as somebody needs it, and leaves nothing behind.
#
#   broker.sh private DIR          until standard input ends; before that, a line `stop` ends it in order and `kill` at once,
#                                  and both leave its data in DIR
#   broker.sh shared DIR LEASE     until nobody has held a lock on the file LEASE for some seconds; then LEASE.ready goes, too;
#                                meanwhile LEASE.supervised is locked
#
# SERVER is the program that starts a node. Each of the two jobs below is a process group of its own, by which it is ended.
set -u -m
mode=$1
dir=$2
idle_limit=8

# What a supervisor that was killed has left: processes that carry its directory in their environment.
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
    # The node may also end by itself: who waits for it to be ready then sees this script end, with its logs left in place.
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
    # Not before the node runs: it must not hold these locks. The first says that this supervisor lives.
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
        # Whoever comes now waits until this has been decided.
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

# The first program of a session's container after init, and of each `exec` in it:
#
#     busybox sh entry.sh [-C DIRECTORY] GATE [COMMAND [ARGUMENT…]]
#
# Goes to DIRECTORY, as the user and inside: a runtime would make a missing one as root, in whatever is mounted there.
# Waits until the file GATE exists ("" for no wait), because the terminal gets its size only after the container has
# started, then becomes COMMAND, or without one the image's best shell. Exit codes as in Bash: 127 when there is no such
# command, 126 when it cannot be executed. It runs in foreign images, hence on nothing but a static busybox.

directory=
if [ "$1" = -C ]; then
    directory=$2
    shift 2
fi
gate=$1
shift
polls=0
while [ -n "$gate" ] && [ ! -e "$gate" ]; do
    # Every millisecond for two seconds; an executor that was killed may need longer.
    if [ $polls -lt 2000 ]; then usleep 1000; polls=$((polls + 1)); else usleep 100000; fi
done

# Looks along PATH by hand: busybox's own applets must not stand in for the image's programs. Sets `found`.
find_command() {
    found= denied=
    case $1 in
    */*)
        if [ -f "$1" ] && [ -x "$1" ]; then found=$1; elif [ -e "$1" ]; then denied=$1; fi
        return
        ;;
    esac
    set -f
    IFS=:
    for directory in ${PATH-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}; do
        file=${directory:-.}/$1
        [ -f "$file" ] || continue
        if [ -x "$file" ]; then found=$file; break; fi
        denied=${denied:-$file}
    done
    unset IFS
    set +f
}

fail() {
    echo "beaker: $2" >&2
    exit "$1"
}

if [ -n "$directory" ]; then
    cd -- "$directory" 2>/dev/null || fail 126 "$directory: there is no such directory, or you may not enter it"
    unset OLDPWD
fi
if [ $# -eq 0 ]; then
    find_command /bin/bash
    [ -n "$found" ] || find_command bash
    [ -n "$found" ] || find_command sh
    [ -n "$found" ] || set -- sh
    found=${found:-/.beaker/busybox}
    export SHELL="$found"
else
    find_command "$1"
    [ -n "$found" ] || [ -z "$denied" ] || fail 126 "$1: cannot be executed"
    [ -n "$found" ] || fail 127 "$1: command not found in this image"
    shift
fi
unset SHLVL
set -- "$found" "$@" # out of the way of the secrets' names
# Secrets asked for as variables. They come by a file so that nobody who may ask the engine can see them.
if [ -r /run/beaker/env ]; then . /run/beaker/env; fi
exec "$@"

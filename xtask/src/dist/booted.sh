# A machine's files with a systemd of its own: `sh booted.sh run NAME`, started as the first of a mount namespace, with a pipe as its input.
#
# Beside this file are `files`, which lie over the machine's, and `programs`, or symbolic links to some, which are in /usr/bin.
#
# All of it ends when nobody has the other end of that pipe any more, in whatever way they ended, and nothing is left then: neither a process,
# nor a control group, nor the folder that this file is in. What happens inside can change no file, no unit, no setting of the kernel's, and
# no network of the machine: files are a layer of tmpfs over the machine's own, /sys and /proc/sys cannot be written to, /dev has
# a few nodes, and of units there are plimsoll's and the few without which nothing is started. It is never shut down, but killed: nothing of
# the machine's is there to be ended.
set -eu
here=$(dirname "$0")
base="basic.target sysinit.target multi-user.target shutdown.target local-fs.target sockets.target slices.target paths.target timers.target
    umount.target final.target systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket"

case $1 in
run)
    # Of the second version, whatever else the machine uses, where nobody but this shell sees it.
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    group=/sys/fs/cgroup/$2
    mkdir "$group"
    exec 3<&0 </dev/null
    (echo 0 >"$group/cgroup.procs" &&
        exec unshare --mount --pid --fork --kill-child --cgroup --uts --ipc --net sh "$0" boot) 3<&- &
    inside=$!
    { read -r _ <&3 || kill -KILL $inside; } &
    status=0
    wait $inside 2>/dev/null || status=$?
    kill $! 2>/dev/null || :
    # What ran in there may be on its way out still.
    until find "$group" -depth -type d -exec rmdir {} + 2>/dev/null; do
        echo 1 >"$group/cgroup.kill"
        sleep 0.02
    done
    rm -rf --one-file-system "$here"
    exit $status
    ;;
boot)
    mount -t tmpfs tmpfs "$here/over"
    root=$here/over/root
    mkdir "$here/over/upper" "$here/over/work" "$root"
    mount -t overlay -o "lowerdir=/,upperdir=$here/over/upper,workdir=$here/over/work" overlay "$root"
    for place in dev run tmp; do mount -t tmpfs -o mode=755 tmpfs "$root/$place"; done
    mkdir -p "$root/etc/trial/sysinit.target.wants"
    for unit in $base; do cp "/usr/lib/systemd/system/$unit" "$root/etc/trial/"; done
    ln -s multi-user.target "$root/etc/trial/default.target"
    # The shipped one, as soon as it is installed.
    ln -s /usr/lib/systemd/system/plimsoll.service "$root/etc/trial/"
    ln -s ../systemd-journald.service "$root/etc/trial/sysinit.target.wants/"
    cp -R "$here/files/." "$root/"
    # Where it is: of a program that is in memory each process would seem to use what it has mapped.
    for program in "$here/programs"/*; do
        [ -e "$program" ] || continue
        touch "$root/usr/bin/${program##*/}"
        mount --bind "$program" "$root/usr/bin/${program##*/}"
    done
    mount -t proc proc "$root/proc"
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    for node in null zero full random urandom tty kvm userfaultfd; do
        [ -e "/dev/$node" ] || continue
        touch "$root/dev/$node"
        mount --bind "/dev/$node" "$root/dev/$node"
    done
    cd "$root"
    mkdir run/machine
    pivot_root . run/machine
    umount -l run/machine
    exec env -i container=plimsoll PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=/etc/trial \
        /usr/lib/systemd/systemd --unit=multi-user.target </dev/null >/dev/null 2>&1
    ;;
esac

#!/bin/bash
# Boot a real systemd as process 1 of namespaces of its own, with a copy-on-write view of this
# machine's folders, so that units can be installed and started without touching the machine.
#   nested_systemd.sh FOLDER     FOLDER/units comes first in the unit path; FOLDER/pid names process 1
# Needs root. Killing process 1 ends everything inside; this shell then removes its cgroups.
set -eu
umask 022 # folders made here are the machine's own, whoever runs the tests
folder=$1
name=fleetcast-nested-$$
here=$(cat /proc/self/cgroup)

# cgroups of its own, below the ones this shell is in (v1, hybrid and pure v2 machines alike)
base_of() {
  case $1 in
  "") if [ -d /sys/fs/cgroup/unified ]; then echo /sys/fs/cgroup/unified; else echo /sys/fs/cgroup; fi ;;
  name=*) echo "/sys/fs/cgroup/${1#name=}" ;;
  *) echo "/sys/fs/cgroup/$1" ;;
  esac
}
each_cgroup() { # runs "$1 PATH" for every hierarchy
  local controllers path
  while IFS=: read -r _ controllers path; do
    [ "$controllers" = cpuset ] && continue # a new v1 cpuset has no processors
    path=$(base_of "$controllers")${path%/}
    if [ -f "$path/cgroup.procs" ]; then "$1" "$path"; fi
  done <<<"$here"
}
enter() { mkdir "$1/$name" && echo $$ >"$1/$name/cgroup.procs"; }
leave() {
  echo $$ >"$1/cgroup.procs"
  find "$1/$name" -depth -type d -exec rmdir {} \;
}
trap 'each_cgroup leave' EXIT
trap : TERM INT
each_cgroup enter

unshare --mount --uts --ipc --net --pid --cgroup --fork --kill-child --mount-proc bash -eu -c '
  mount --make-rprivate /
  mount -t tmpfs tmpfs /mnt
  for top in etc var opt root; do
    mkdir -p /mnt/$top/upper /mnt/$top/work
    mount -t overlay overlay -o lowerdir=/$top,upperdir=/mnt/$top/upper,workdir=/mnt/$top/work /$top
  done
  mount -t tmpfs tmpfs /run
  umount -R /sys/fs/cgroup || true
  mount -t tmpfs tmpfs /sys/fs/cgroup
  mount --bind /proc/sys /proc/sys
  mount -o remount,bind,ro /proc/sys
  ip link set lo up
  hostname nested
  export container=nested SYSTEMD_UNIT_PATH=$0/units:/etc/systemd/system
  exec /lib/systemd/systemd --system --unit=nested.target --log-target=console --show-status=no
' "$folder" </dev/null &
unshare_pid=$!
for _ in $(seq 50); do
  inner=$(cat /proc/$unshare_pid/task/$unshare_pid/children 2>/dev/null) || true
  [ -n "${inner// /}" ] && break
  sleep 0.1
done
echo "${inner// /}" >"$folder/pid"
while kill -0 $unshare_pid 2>/dev/null; do wait $unshare_pid || true; done

#!/bin/sh
# One more backup in FOLDER, and of the earlier ones by this script the last KEEP: `sh backup.sh FOLDER`.
#
#   sh backup.sh FOLDER          once: what imfine-backup.timer calls each night
#   sh backup.sh FOLDER nightly  for ever, for a container: one whenever the last is a day old
#
# Where a backup fails, or lacks something, nothing older is removed: it may hold what is lost now.
set -eu
umask 077

folder=${1:?say: backup.sh FOLDER [nightly]}
keep=${KEEP:-7}
python=${PYTHON:-python}

once() {
    "$python" -m relay backup "$folder/nightly-$(date -u +%Y%m%d-%H%M%S).tar" || return
    # shellcheck disable=SC2012  # the names are ours
    ls -1 "$folder"/nightly-*.tar | LC_ALL=C sort -r | tail -n "+$((keep + 1))" | while read -r old; do rm -f "$old"; done
}
is_fresh() { find "$folder" -name 'nightly-*.tar' -mmin -1380 | grep -q .; } # 23 hours, so that it stays about a day

case $keep in
'' | 0 | *[!0-9]*) echo "backup: KEEP is '$keep': give a whole number above 0" >&2; exit 2 ;;
esac
case ${2:-} in
'') once ;;
nightly)
    trap exit TERM INT
    while :; do
        # The mark is what the health check of compose looks at.
        is_fresh || if once; then rm -f "$folder/failed"; else touch "$folder/failed"; fi
        sleep "${LOOK_S:-3600}" &
        wait $!
    done
    ;;
*) echo "backup: there is no '$2': say nightly, or nothing" >&2; exit 2 ;;
esac

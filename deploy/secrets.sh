#!/bin/sh
# Makes the settings file of a relay with secrets of its own, or makes one secret anew.
#
#   sh deploy/secrets.sh FILE DATA_DIR                 what is missing; what is there stays
#   sh deploy/secrets.sh FILE DATA_DIR metrics-token   a new RELAY_METRICS_TOKEN
#   sh deploy/secrets.sh FILE DATA_DIR admin-key       a new admin.key, by the relay at its next start
#   sh deploy/secrets.sh FILE DATA_DIR enrol-token     a new enrol.token, likewise
#
# Nothing here has a default value. The relay reads secrets at its start: restart it afterwards.
set -eu
umask 077

file=${1:?say: secrets.sh FILE DATA_DIR [WHAT]}
data=${2:?say: secrets.sh FILE DATA_DIR [WHAT]}
what=${3:-}

die() { printf 'secrets: %s\n' "$*" >&2; exit 1; }
random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }

# Written beside and renamed: a reader finds the old file or the new one.
put() { # NAME VALUE
    { [ ! -e "$file" ] || grep -v "^$1=" "$file" || true; printf '%s=%s\n' "$1" "$2"; } >"$file.new"
    mv "$file.new" "$file"
}
has() { [ -e "$file" ] && grep -q "^$1=." "$file"; }

# The relay makes its two keys itself; a value in the settings would win over the file.
forget() { # NAME FILE
    ! has "$1" || die "$1 is set in $file: take that line out, so that the relay makes its own"
    rm -f "$data/$2"
}

case $what in
'')
    mkdir -p "$(dirname "$file")"
    has RELAY_DATA_DIR || put RELAY_DATA_DIR "$data"
    has RELAY_METRICS_TOKEN || put RELAY_METRICS_TOKEN "$(random)"
    ;;
metrics-token) put RELAY_METRICS_TOKEN "$(random)" ;;
admin-key) forget RELAY_ADMIN_KEY admin.key ;;
enrol-token) forget RELAY_ENROL_TOKEN enrol.token ;;
*) die "there is no $what: metrics-token, admin-key or enrol-token" ;;
esac
chmod 600 "$file"

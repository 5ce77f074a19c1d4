#!/bin/sh
# Makes the settings file of a relay with secrets of its own, or makes one secret anew.
#
#   sh deploy/secrets.sh FILE DATA_DIR                    what is missing; what is there stays
#   sh deploy/secrets.sh FILE DATA_DIR production         for compose.production.yaml: also what is missing of
#                                                         database.env, broker.env and flower.env beside FILE
#   sh deploy/secrets.sh FILE DATA_DIR metrics-token      a new RELAY_METRICS_TOKEN
#   sh deploy/secrets.sh FILE DATA_DIR admin-key          a new admin.key, by the relay at its next start
#   sh deploy/secrets.sh FILE DATA_DIR enrol-token        a new enrol.token, likewise
#   sh deploy/secrets.sh FILE DATA_DIR flower-password    a new one of Flower
#   sh deploy/secrets.sh FILE DATA_DIR database-password  a new one in the PostgreSQL of compose.production.yaml
#   sh deploy/secrets.sh FILE DATA_DIR broker-password    a new one in its RabbitMQ
#
# Nothing here has a default value. Services read secrets at their start: restart them afterwards. A password goes
# to a server by its input, for everybody may read a command line; if that fails, the files stay as they were.
set -eu
umask 077

file=${1:?say: secrets.sh FILE DATA_DIR [WHAT]}
data=${2:?say: secrets.sh FILE DATA_DIR [WHAT]}
what=${3:-}
beside=$(dirname "$file")
database=$beside/database.env
broker=$beside/broker.env
flower=$beside/flower.env

die() { printf 'secrets: %s\n' "$*" >&2; exit 1; }
random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }
compose() { docker compose -f "$(dirname "$0")/compose.production.yaml" "$@"; }

# Written beside and renamed: a reader finds the old file or the new one.
put() { # FILE NAME VALUE
    { [ ! -e "$1" ] || grep -v "^$2=" "$1" || true; printf '%s=%s\n' "$2" "$3"; } >"$1.new"
    mv "$1.new" "$1"
}
get() { # FILE NAME
    [ ! -e "$1" ] || sed -n "s/^$2=//p" "$1" | tail -n 1 | sed "s/^\\(['\"]\\)\\(.*\\)\\1\$/\\2/"
}
has() { [ -n "$(get "$1" "$2")" ]; }

# The relay makes its two keys itself; a value in the settings would win over the file.
forget() { # NAME FILE
    ! has "$file" "$1" || die "$1 is set in $file: take that line out, so that the relay makes its own"
    rm -f "$data/$2"
}

# The server's own file first: one that was cut off after it goes on with the same password.
name_database() { # PASSWORD
    put "$database" POSTGRES_PASSWORD "$1"
    put "$file" RELAY_DATABASE_URL "postgresql+asyncpg://imfine:$1@postgres:5432/imfine"
}
name_broker() { # PASSWORD
    put "$broker" RABBITMQ_DEFAULT_PASS "$1"
    put "$flower" RELAY_BROKER_URL "amqp://imfine:$1@rabbitmq:5672/"
    put "$file" RELAY_BROKER_URL "amqp://imfine:$1@rabbitmq:5672/"
}
kept_or_random() { # FILE NAME
    if has "$1" "$2"; then get "$1" "$2"; else random; fi
}

case $what in
'' | production)
    mkdir -p "$beside"
    has "$file" RELAY_DATA_DIR || put "$file" RELAY_DATA_DIR "$data"
    has "$file" RELAY_METRICS_TOKEN || put "$file" RELAY_METRICS_TOKEN "$(random)"
    if [ "$what" = production ]; then
        has "$file" RELAY_DATABASE_URL || name_database "$(kept_or_random "$database" POSTGRES_PASSWORD)"
        has "$file" RELAY_BROKER_URL || name_broker "$(kept_or_random "$broker" RABBITMQ_DEFAULT_PASS)"
        has "$flower" RELAY_FLOWER_PASSWORD || put "$flower" RELAY_FLOWER_PASSWORD "$(random)"
    fi
    ;;
metrics-token) put "$file" RELAY_METRICS_TOKEN "$(random)" ;;
admin-key) forget RELAY_ADMIN_KEY admin.key ;;
enrol-token) forget RELAY_ENROL_TOKEN enrol.token ;;
flower-password)
    if has "$flower" RELAY_FLOWER_PASSWORD; then
        put "$flower" RELAY_FLOWER_PASSWORD "$(random)"
    else
        forget RELAY_FLOWER_PASSWORD flower.password
    fi
    ;;
database-password)
    has "$database" POSTGRES_PASSWORD || die "$database is not there: see docs/operations/secrets.md for a PostgreSQL of your own"
    new=$(random)
    printf "ALTER ROLE imfine PASSWORD '%s';\n" "$new" |
        compose exec -T postgres psql -q -v ON_ERROR_STOP=1 -U postgres -d postgres ||
        die "PostgreSQL has not taken it: the old password stays"
    name_database "$new"
    ;;
broker-password)
    has "$broker" RABBITMQ_DEFAULT_PASS || die "$broker is not there: see docs/operations/secrets.md for a RabbitMQ of your own"
    new=$(random)
    printf '%s\n' "$new" | compose exec -T rabbitmq rabbitmqctl -q change_password imfine ||
        die "RabbitMQ has not taken it: the old password stays"
    name_broker "$new"
    ;;
*) die "there is no $what: the top of secrets.sh has all that there is" ;;
esac
for made in "$file" "$database" "$broker" "$flower"; do
    [ ! -e "$made" ] || chmod 600 "$made"
done

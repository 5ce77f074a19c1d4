#!/bin/sh
# nginx.conf for one machine, to stdout: `DOMAIN=fine.example sh deploy/nginx/render.sh >/etc/imfine/nginx.conf`.
#
# Everything else has a default. The limits are the relay's own settings, so that both say the same.
set -eu

domain=${DOMAIN:-}
relays=${RELAYS:-127.0.0.1:8000} # with spaces between
flower=${FLOWER:-}               # host:port of Flower; empty: nobody sees it from outside
addresses=${ADDRESSES:-}         # to listen on; empty: all
http_port=${HTTP_PORT:-80}
https_port=${HTTPS_PORT:-443}
tls=${TLS_DIR:-/etc/imfine/tls}
form_bytes=1048576 # what a form needs beside its file

die() { printf 'render: %s\n' "$*" >&2; exit 1; }

# Nothing that ends up in the file may end a line or a directive of it.
check() { # NAME VALUE PATTERN
    [ "$(printf '%s\n' "$2" | wc -l)" -eq 1 ] || die "$1 has more than one line: $4"
    printf '%s\n' "$2" | grep -Eqx -- "$3" || die "$1 is '$2': $4"
}
label='[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?'
place='[A-Za-z0-9._-]+:[0-9]+|\[[0-9a-f:]+\]:[0-9]+'
check DOMAIN "$domain" "($label\\.)*$label" 'give the name that people type, such as fine.example'
for relay in $relays; do
    check RELAYS "$relay" "$place" 'give host:port, with spaces between'
done
[ -z "$flower" ] || check FLOWER "$flower" "$place" 'give host:port, or nothing'
for number in "$http_port" "$https_port" "${RELAY_MAX_BODY_BYTES:=8388608}" \
    "${RELAY_MAX_UPLOAD_BYTES:=536870912}" "${RELAY_MAX_ADAPTER_BYTES:=17179869184}"; do
    check 'a port or a number of bytes' "$number" '[0-9]+' 'give a whole number'
done
for path in "$tls" "${ACME_ROOT:=/var/www/acme}" "${STATE:=/var/lib/nginx}" "${PID:=/run/nginx.pid}" \
    "${ERROR_LOG:=/var/log/nginx/error.log}"; do
    check 'a path' "$path" '[A-Za-z0-9/._-]+' 'use letters, digits and ._- only'
done

if [ -z "$addresses" ]; then
    addresses=0.0.0.0
    [ ! -e /proc/net/if_inet6 ] || addresses="$addresses [::]"
fi
for address in $addresses; do
    check ADDRESSES "$address" '[0-9.]+|\[[0-9a-f:]+\]' 'give addresses, with spaces between'
done
listen() { # PORT MORE
    for address in $addresses; do
        printf '        listen %s:%s%s;\n' "$address" "$1" "$2"
    done
}
servers() {
    # One server is never set aside. Of several, one that does not answer is left alone for five seconds.
    for relay in $relays; do
        printf '        server %s max_fails=1 fail_timeout=5s;\n' "$relay"
    done
}
with_flower() { [ -z "$flower" ] || cat "$(dirname "$0")/flower.conf"; }
suffix=''
[ "$https_port" = 443 ] || suffix=:$https_port

DOMAIN=$domain HTTPS_SUFFIX=$suffix ACME_ROOT=$ACME_ROOT STATE=$STATE PID=$PID ERROR_LOG=$ERROR_LOG \
    CERTIFICATE=$tls/fullchain.pem CERTIFICATE_KEY=$tls/privkey.pem \
    HTTP=$(listen "$http_port" '') HTTP_DEFAULT=$(listen "$http_port" ' default_server') \
    HTTPS=$(listen "$https_port" ' ssl http2') HTTPS_DEFAULT=$(listen "$https_port" ' ssl http2 default_server') \
    RELAYS=$(servers) MAX_BODY=$RELAY_MAX_BODY_BYTES MAX_UPLOAD=$((RELAY_MAX_UPLOAD_BYTES + form_bytes)) \
    MAX_ADAPTER=$RELAY_MAX_ADAPTER_BYTES FLOWER=$(with_flower) FLOWER_AT=$flower \
    awk '{
        while (match($0, /@[A-Z_]+@/)) {
            name = substr($0, RSTART + 1, RLENGTH - 2)
            if (!(name in ENVIRON)) { print "render: nothing for " name > "/dev/stderr"; exit 1 }
            $0 = substr($0, 1, RSTART - 1) ENVIRON[name] substr($0, RSTART + RLENGTH)
        }
        print
    }' "$(dirname "$0")/nginx.conf"

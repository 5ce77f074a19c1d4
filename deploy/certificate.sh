#!/bin/sh
# Puts a certificate where nginx reads it. certbot calls it after each renewal, by its deploy hook, and
# `again LINEAGE` does so where that was cut off, or what it had put there is gone. Called with `first DOMAIN` it makes
# a certificate of its own where there is none that can be used, so that nginx can start and show certbot's proof.
set -eu
umask 077

tls=${TLS_DIR:-/etc/imfine/tls}

# Both files are there whole or not at all; nginx reads them at its next reload. Where the power fails between the two,
# they do not belong together, and nginx would not start.
is_pair() {
    key=$(openssl pkey -in "$tls/privkey.pem" -pubout 2>/dev/null) &&
        [ "$key" = "$(openssl x509 -in "$tls/fullchain.pem" -noout -pubkey 2>/dev/null)" ]
}
put() { # CERTIFICATE KEY
    mkdir -p "$tls"
    cp "$1" "$tls/fullchain.pem.new.$$" # certbot's hook and the look after it may be at work at once
    cp "$2" "$tls/privkey.pem.new.$$"
    sync
    mv "$tls/privkey.pem.new.$$" "$tls/privkey.pem"
    mv "$tls/fullchain.pem.new.$$" "$tls/fullchain.pem"
}

if [ "${1:-}" = first ]; then
    ! is_pair || exit 0
    made=$(mktemp -d)
    trap 'rm -rf "$made"' EXIT
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj "/CN=$2" \
        -addext "subjectAltName=DNS:$2" -keyout "$made/key" -out "$made/certificate" 2>/dev/null
    put "$made/certificate" "$made/key"
    exit 0
fi

if [ "${1:-}" = again ]; then
    RENEWED_LINEAGE=$2
    [ -e "$2/fullchain.pem" ] || exit 0 # there was none yet
    ! cmp -s "$2/fullchain.pem" "$tls/fullchain.pem" || ! cmp -s "$2/privkey.pem" "$tls/privkey.pem" || exit 0
fi
: "${RENEWED_LINEAGE:?is set by certbot}"
put "$RENEWED_LINEAGE/fullchain.pem" "$RENEWED_LINEAGE/privkey.pem"
${RELOAD:-systemctl reload nginx}

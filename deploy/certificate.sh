#!/bin/sh
# Puts a certificate where nginx reads it. certbot calls it after each renewal, by its deploy hook; called with
# `first DOMAIN` it makes a certificate of its own, so that nginx can start and show the proof that certbot needs.
set -eu
umask 077

tls=${TLS_DIR:-/etc/imfine/tls}

# Both files are there whole or not at all; nginx reads them at its next reload.
put() { # CERTIFICATE KEY
    mkdir -p "$tls"
    cp "$1" "$tls/fullchain.pem.new"
    cp "$2" "$tls/privkey.pem.new"
    mv "$tls/privkey.pem.new" "$tls/privkey.pem"
    mv "$tls/fullchain.pem.new" "$tls/fullchain.pem"
}

if [ "${1:-}" = first ]; then
    [ ! -e "$tls/fullchain.pem" ] || exit 0
    made=$(mktemp -d)
    trap 'rm -rf "$made"' EXIT
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj "/CN=$2" \
        -addext "subjectAltName=DNS:$2" -keyout "$made/key" -out "$made/certificate" 2>/dev/null
    put "$made/certificate" "$made/key"
    exit 0
fi

: "${RENEWED_LINEAGE:?is set by certbot}"
put "$RENEWED_LINEAGE/fullchain.pem" "$RENEWED_LINEAGE/privkey.pem"
${RELOAD:-systemctl reload nginx}

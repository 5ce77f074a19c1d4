#!/bin/sh
# certbot in a container: asks for the certificate, and twice a day whether it is due again. Until there is one, every
# quarter of an hour: Let's Encrypt takes five attempts an hour that fail.
set -eu
live=${LIVE:-/etc/letsencrypt/live/imfine}

trap exit TERM INT
while :; do
    certbot certonly --non-interactive --agree-tos --email "$EMAIL" --domain "$DOMAIN" --cert-name imfine \
        --webroot --webroot-path "$ACME_ROOT" --keep-until-expiring \
        --deploy-hook 'RELOAD=true sh /deploy/certificate.sh' || true # nginx goes on with what it has; it is tried again
    RELOAD=true sh /deploy/certificate.sh again "$live" || true
    if [ -e "$live/fullchain.pem" ]; then sleep "${LOOK_S:-43200}" & else sleep "${AGAIN_S:-900}" & fi
    wait $!
done

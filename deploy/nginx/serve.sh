#!/bin/sh
# nginx in a container: renders the configuration, starts with a certificate of its own if there is none yet, and takes
# up a renewed one within a minute. Its settings are render.sh's.
set -eu
cd "$(dirname "$0")"

conf=${NGINX_CONF:-/etc/nginx/nginx.conf}
tls=${TLS_DIR:-/etc/imfine/tls}
globals="user ${NGINX_USER:-www-data}; daemon off;"
look_s=${LOOK_S:-60}

TLS_DIR=$tls sh ../certificate.sh first "$DOMAIN"
sh ./render.sh >"$conf"
/usr/sbin/nginx -t -q -c "$conf" -g "$globals"

fingerprint() { cksum "$tls/fullchain.pem"; }
/usr/sbin/nginx -c "$conf" -g "$globals" &
nginx=$!
trap 'kill $nginx' TERM INT QUIT
served=$(fingerprint)
while kill -0 $nginx 2>/dev/null; do
    sleep "$look_s" &
    wait $! || break # a signal came, and nginx has it too
    if [ "$(fingerprint)" != "$served" ]; then
        served=$(fingerprint)
        kill -HUP $nginx
    fi
done
wait $nginx

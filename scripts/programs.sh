#!/bin/sh
# Sees to the programs that some slow tests run: Debian's chromium and chromium-driver (the chat page) and nginx (the
# replicas). Without root nothing is changed, and those tests skip themselves.
set -eu

missing=
command -v chromium >/dev/null 2>&1 || missing="$missing chromium"
command -v chromedriver >/dev/null 2>&1 || missing="$missing chromium-driver"
command -v nginx >/dev/null 2>&1 || missing="$missing nginx-light"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "programs: installing$missing for tests that run them"
    # Names, one a word.
    apt-get update -qq && apt-get install -y -qq $missing
else
    echo "programs: the tests that need them will be skipped (Debian: sudo apt-get install$missing)" >&2
fi

#!/bin/sh
# Sees to the browser that the test of the chat page looks through: Debian's chromium and chromium-driver.
# Without root nothing is changed, and that test skips itself.
set -eu

if command -v chromium >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "browser: installing chromium and chromium-driver for the test of the chat page"
    apt-get update -qq && apt-get install -y -qq chromium chromium-driver
else
    echo "browser: no chromium and chromedriver: the test of the chat page will be skipped" \
        "(Debian: sudo apt-get install chromium chromium-driver)" >&2
fi

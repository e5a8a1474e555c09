#!/bin/sh
# What the tests need besides Python packages: a virtual screen, a window manager, xdotool for clicks and keys, a browser
# with its driver, and the shared libraries that opencv-python loads. Installs them as root on Debian or Ubuntu; elsewhere it only looks.
set -eu
wanted=""
command -v Xvfb >/dev/null 2>&1 || wanted="$wanted xvfb"
command -v openbox >/dev/null 2>&1 || wanted="$wanted openbox"
command -v xdotool >/dev/null 2>&1 || wanted="$wanted xdotool"
command -v chromium >/dev/null 2>&1 || wanted="$wanted chromium"
command -v chromedriver >/dev/null 2>&1 || wanted="$wanted chromium-driver"
ldconfig -p 2>/dev/null | grep -q "libGL.so.1" || wanted="$wanted libgl1"
ldconfig -p 2>/dev/null | grep -q "libglib-2.0.so.0" || wanted="$wanted libglib2.0-0"
[ -z "$wanted" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $wanted
else
    echo "Not installed:$wanted. Tests that need them will say so."
fi

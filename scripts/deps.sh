#!/bin/sh
# Installs missing system packages: 'build' those for the program, 'test' also those for its tests. Works on Debian and Ubuntu; on other
# systems it prints what to install.
set -eu

missing=""
need() { # need PACKAGE COMMAND...: marks the package as missing if the command fails
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}

is_ubuntu() {
    grep -qs '^ID=ubuntu' /etc/os-release
}

browser() {
    chromium --version || chromium-browser --version || google-chrome --version || google-chrome-stable --version
}

need pkg-config pkg-config --version
need libssl-dev pkg-config --exists openssl
need gcc cc --version
case ${1:-build} in
build) ;;
test)
    need g++ c++ --version
    need rabbitmq-server test -x /usr/lib/rabbitmq/bin/rabbitmq-server
    need redis-server redis-server --version
    need openssl openssl version
    need python3 python3 --version
    # A browser for the Control Tower: any Chromium or Chrome, with the ChromeDriver of its version. Ubuntu has both only as snaps,
    # under other package names.
    if is_ubuntu; then
        need chromium-browser browser
        need chromium-chromedriver chromedriver --version
    else
        need chromium browser
        need chromium-driver chromedriver --version
    fi
    need python3-venv python3 -c 'import ensurepip, venv'
    ;;
*)
    echo "usage: $0 build|test" >&2
    exit 2
    ;;
esac

[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "please install:$missing" >&2
    exit 1
fi
root=""
[ "$(id -u)" = 0 ] || root="sudo"
echo "installing:$missing" >&2
# The tests start their own broker; the packages must not start or change the system's.
export DEBIAN_FRONTEND=noninteractive
$root apt-get -o Acquire::Retries=3 update -q
# shellcheck disable=SC2086
$root apt-get -o Acquire::Retries=3 install -qy --no-install-recommends $missing

# Where snaps do not run, as in a container, Ubuntu's packages install without a working browser.
if [ "${1:-build}" = test ] && ! { browser && chromedriver --version; } >/dev/null 2>&1; then
    echo "no working browser was installed: please install Chrome or Chromium, and the chromedriver of its version" >&2
    exit 1
fi

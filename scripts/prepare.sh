# Sourced by ./demo and ./test: Debian packages, and a private Python environment in .venv. Changes nothing else.
# Every step that reaches outside has a time limit, and does nothing when its result is there already.

say() { printf '%s\n' "$*" >&2; }

# Run a command as root.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        say "error: this needs root, and there is no sudo"
        say "hint: run it as root"
        exit 1
    fi
}

# Packages must not start the daemons that they bring. A policy that is there already is the owner's, and is kept.
policy=/usr/sbin/policy-rc.d
keep_daemons_still() {
    [ ! -e "$policy" ] || return 0
    trap 'as_root rm -f "$policy"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
}

# install_packages NAME...: those that are not installed yet.
install_packages() {
    missing=
    for package in "$@"; do
        case $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) in
            installed) ;;
            *) missing="$missing $package" ;;
        esac
    done
    [ -n "$missing" ] || return 0
    say "installing:$missing"
    (
        keep_daemons_still
        as_root timeout --foreground 300 apt-get -qq update
        # shellcheck disable=SC2086  # one word for each package
        as_root env DEBIAN_FRONTEND=noninteractive timeout --foreground 1200 \
            apt-get -qq -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 install --no-install-recommends $missing >&2
    )
}

# make_environment [EXTRA]: .venv with Stockade in it, and the packages of that extra of pyproject.toml.
make_environment() {
    stamp=.venv/installed${1:+-$1}
    if [ -e "$stamp" ] && [ -z "$(find pyproject.toml hatch_build.py warden bin -newer "$stamp")" ]; then
        return 0
    fi
    say "preparing .venv"
    [ -x .venv/bin/pip ] || timeout --foreground 120 /usr/bin/python3 -m venv .venv
    timeout --foreground 600 .venv/bin/pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
    touch "$stamp"
}

#!/usr/bin/env bash
# Installs the Debian packages of the virtual bench, or says which are missing. Idempotent; starts no service.
#   system-packages.sh                 install what is missing
#   system-packages.sh --download DIR  put the packages and what they need into DIR (for HIL_OFFLINE)
set -eu -o pipefail

packages=(
    qemu-system-arm qemu-system-x86 ipxe-qemu seabios  # the emulators of board and link box
    u-boot-qemu u-boot-tools                            # the board's firmware and its environment
    e2fsprogs fakeroot cpio                             # root file systems without root
    iproute2 openssh-client                             # namespaces; ssh-keygen
)
if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    packages+=(python3-venv)
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "setup: this machine has no apt. Install the equivalents of these Debian packages, then run again:" >&2
    echo "  ${packages[*]}" >&2
    exit 4
fi

apt_options=(-q)
if [ -n "${HIL_OFFLINE:-}" ]; then
    # The folder alone is the source, and its lists stay apart from the system's own.
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    mkdir -p "$scratch/lists/partial" # apt removes what it does not know from its lists: the source stays outside
    echo "deb [trusted=yes] copy:$(realpath "$HIL_OFFLINE")/debs ./" >"$scratch/offline.list"
    chmod -R go+rX "$scratch"
    apt_options+=(-o "Dir::Etc::SourceList=$scratch/offline.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$scratch/lists")
fi

if [ "${1:-}" = --download ]; then
    mkdir -p "$2"
    # shellcheck disable=SC2046  # one word a package is meant
    cd "$2" && apt-get download $(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances "${packages[@]}" python3-venv | grep '^[a-z0-9]' | sort -u)
    exit
fi

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    exit
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "setup: root is needed once. As root, run: apt-get install ${missing[*]}" >&2
        exit 4
    fi
    as_root=(sudo)
fi
echo "setup: installing Debian packages: ${missing[*]}"
"${as_root[@]}" apt-get "${apt_options[@]}" update >/dev/null ||
    echo "setup: apt-get update failed; using the lists that are there" >&2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get "${apt_options[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null

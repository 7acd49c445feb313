# Debian's cloud kernel for the guests; to be sourced. Uses $scratch and $cache, sets $release.

# Downloads the kernel's package unless it is in the cache, and unpacks it into $scratch/kernel.
fetch_kernel() {
    local package
    if ! ls "$cache"/linux-image-*-cloud-amd64_*.deb >/dev/null 2>&1; then
        [ -n "$(apt-cache search --names-only '^linux-image-cloud-amd64$')" ] || [ "$(id -u)" != 0 ] || apt-get update >/dev/null
        package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ {print $2; exit}')
        [ -n "$package" ] || { echo "guest: apt knows no linux-image-cloud-amd64 (run apt-get update)" >&2; exit 2; }
        (cd "$scratch" && apt-get download "$package" >/dev/null 2>"$scratch/apt.log") || { cat "$scratch/apt.log" >&2; exit 2; }
        mv "$scratch"/linux-image-*.deb "$cache/"
    fi
    dpkg -x "$(ls "$cache"/linux-image-*-cloud-amd64_*.deb | sort -V | tail -1)" "$scratch/kernel"
    release=$(basename "$scratch"/kernel/lib/modules/*)
}

# usage: copy_modules ROOT TO MODULE...: the modules and what they need, and TO/order with the order to load them in.
copy_modules() {
    local root=$1 to=$2 path
    shift 2
    for path in $(modprobe -d "$root" -S "$release" --show-depends -a "$@" | awk '/^insmod/ && !seen[$2]++ {print $2}'); do
        cp "$path" "$to/"; basename "$path" >> "$to/order"
    done
}

# usage: install_program PROGRAM ROOT PATH: a dynamic program as PATH, with the libraries it names, where its loader looks
# for them.
install_program() {
    local path
    install -D -m 755 "$1" "$2$3"
    for path in $(ldd "$1" | grep -o '/[^ ]*'); do
        mkdir -p "$2$(dirname "$path")"
        cp -L "$path" "$2$path"
    done
}

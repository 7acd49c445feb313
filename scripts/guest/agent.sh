# QEMU's guest agent for the guests; to be sourced. Uses $scratch and $cache, sets $agent.

# Downloads the agent's package unless it is in the cache, and unpacks its program. The libraries it needs are those that
# QEMU's own tools need: they are on every machine that runs the tests, and are taken from it.
fetch_agent() {
    if ! ls "$cache"/qemu-guest-agent_*.deb >/dev/null 2>&1; then
        [ -n "$(apt-cache search --names-only '^qemu-guest-agent$')" ] || [ "$(id -u)" != 0 ] || apt-get update >/dev/null
        # That of the release itself: one of the backports may ask for a newer C library than the guest's other programs.
        (cd "$scratch" && apt-get download qemu-guest-agent >/dev/null 2>"$scratch/apt.log") || { cat "$scratch/apt.log" >&2; exit 2; }
        mv "$scratch"/qemu-guest-agent_*.deb "$cache/"
    fi
    dpkg -x "$(ls "$cache"/qemu-guest-agent_*.deb | sort -V | tail -1)" "$scratch/agent"
    agent=$scratch/agent/usr/sbin/qemu-ga
    if ldd "$agent" | grep -q 'not found'; then
        echo "guest: libraries of the agent are missing: $(ldd "$agent" | grep 'not found')" >&2; exit 2
    fi
}

"""The table of rows: samples of both sides taken in turn, medians, the ratio, and how busy strangers kept the machine."""
import os
import resource
import statistics
import time
import traceback

from servers import warm_pages

ROWS = []
FAILED = []
ROUNDS = int(os.environ.get("AQUIFER_BENCH_ROUNDS", "3"))
# Where a budget asks for a few per cent, single runs differ by more than that.
CLOSE_ROUNDS = 3 * ROUNDS
# One side of a row that takes longer than this is not repeated: its noise is small, the reader's time is not.
LONG_SECONDS = 15


class Strangers:
    """CPU that is neither ours nor our children's, as a share of the whole machine, since this was made."""

    def __init__(self):
        self.start = self.now()

    @staticmethod
    def now():
        with open("/proc/stat") as stat:
            fields = [int(x) for x in stat.readline().split()[1:9]]
        hertz = os.sysconf("SC_CLK_TCK")
        idle = (fields[3] + fields[4]) / hertz
        busy = sum(fields) / hertz - idle
        mine = sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
        return busy, mine, busy + idle

    def share(self):
        (busy0, mine0, all0), (busy, mine, every) = self.start, self.now()
        return max(0.0, (busy - busy0) - (mine - mine0)) / max(every - all0, 0.01)


def cpu():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(sides, warm=(), rounds=ROUNDS):
    """Calls the sides in turn, `rounds` times; each answers one figure. Returns (samples, CPU seconds) of each, where the CPU
    is that of all programs of a side, and before each of them the files `warm` are read."""
    samples = [([], []) for _ in sides]
    slow = [False] * len(sides)
    for _ in range(rounds):
        for n, side in enumerate(sides):
            if slow[n]:
                continue
            warm_pages(*warm)
            start, used = time.monotonic(), cpu()
            samples[n][0].append(side())
            samples[n][1].append(cpu() - used)
            slow[n] = time.monotonic() - start > LONG_SECONDS
    return samples


def compare(group, work, ours, *peers, unit, better, warm=(), rounds=ROUNDS):
    """Rows of one work against peers, all measured in turn. A peer is (name, budget, function)."""
    guard = Strangers()
    try:
        us, *others = measure([ours, *(side for _, _, side in peers)], warm, rounds)
    except Exception as error:  # what cannot be measured is shown as such
        return lost(group, f"{work}, against {', '.join(p[0] for p in peers)}", error)
    for (name, budget, _), samples in zip(peers, others):
        add(group, work, name, budget, unit, better, us, samples, guard.share())


def limit(group, work, ours, most, unit, warm=()):
    """A row whose budget is a figure and not a peer: at most `most`."""
    guard = Strangers()
    try:
        (us,) = measure([ours], warm)
    except Exception as error:
        return lost(group, work, error)
    add(group, work, f"at most {most:g} {unit}", 1.0, unit, "less", us, ([most], []), guard.share(), absolute=True)


def lost(group, work, error):
    traceback.print_exc()
    FAILED.append({"group": group, "work": work, "why": str(error) or type(error).__name__})


def add(group, work, peer, budget, unit, better, us, samples, strangers, absolute=False):
    (us, our_cpu), (samples, their_cpu) = us, samples
    a, b = statistics.median(us), statistics.median(samples)
    ratio = (a / b if better == "more" else b / a) if a and b else 0.0
    met = None if budget is None else ratio >= budget
    ROWS.append({"group": group, "work": work, "peer_name": peer, "budget": budget, "unit": unit, "better": better, "ours": a, "peer": b,
                 "ratio": ratio, "met": met, "ours_all": us, "peer_all": samples, "our_cpu": our_cpu, "peer_cpu": their_cpu, "strangers": strangers, "absolute": absolute,
                 "measured": time.strftime("%Y-%m-%d %H:%M")})
    verdict = {None: "", True: "met", False: "MISSED"}[met]
    print(f"{group}: {work}, against {peer}: {a:.4g} and {b:.4g} {unit}: {ratio:.2f} x, budget {budget} {verdict}"
          f" (strangers {strangers:.0%})", flush=True)

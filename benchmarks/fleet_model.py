# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A model of a rollout on paper: how long an update takes and what the origin has to send, for a fleet in sites.

    python3 benchmarks/fleet_model.py --hosts 100000 --sites 400 --update 60.5 --delta 1.5 --peer 7.8

    python3 benchmarks/fleet_model.py --rollout --hosts 20 1000 --sites 2 --controller 0.35 0.25

Hosts prefetch in waves. All hosts of a wave share the origin's link, those of a site also the site's link, and a seed's
link is shared by the hosts that take from it. What a transfer gets is its share of the narrowest link. Whatever
delivers the content, each host asks the origin what the image is. Sizes are in MB, links in Mbit/s, times in seconds.
Processor time counts per host, beside the transfer.

The bytes at the origin were held against a rollout to twenty hosts in two sites (benchmarks/README.md).

With ``--rollout`` the whole of it is told, as the playbook ``rollout`` arranges it: the waves, what they take, how many
hosts a bad image reaches, and how long a host has an image that nobody confirmed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Fleet:
    """Hosts, sites, waves, links in Mbit/s, and the MB of manifests and configurations that a host asks for."""

    hosts: int
    sites: int
    waves: int
    origin: float
    site: float
    lan: float
    documents: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Seconds until the last host has the image, and MB that the origin sent."""

    seconds: float
    megabytes: float


def wave(fleet: Fleet, hosts: int, megabytes: float, work: float) -> Outcome:
    """One wave whose hosts all fetch from the origin; they are spread evenly over the sites."""
    if not hosts:
        return Outcome(0.0, 0.0)
    here = math.ceil(hosts / fleet.sites)
    share = min(fleet.origin / hosts, fleet.site / here, fleet.lan)
    return Outcome(megabytes * 8 / share + work, megabytes * hosts)


def direct(fleet: Fleet, megabytes: float, work: float) -> Outcome:
    """Every host fetches from the origin: whole layers, or deltas."""
    seconds = sent = 0.0
    left = fleet.hosts
    for number in range(fleet.waves):
        hosts = math.ceil(left / (fleet.waves - number))
        one = wave(fleet, hosts, megabytes, work)
        seconds, sent, left = seconds + one.seconds, sent + one.megabytes, left - hosts
    return Outcome(seconds, sent + fleet.hosts * fleet.documents)


def by_seeds(fleet: Fleet, first: float, seeded: float, seeds: int, work: float) -> Outcome:
    """``seeds`` hosts of each site fetch ``first`` MB from the origin; the others then take ``seeded`` MB each from
    them.
    """
    begun = wave(fleet, min(seeds * fleet.sites, fleet.hosts), first, work)
    others = max(math.ceil(fleet.hosts / fleet.sites) - seeds, 0)
    seconds = begun.seconds
    for number in range(fleet.waves):
        hosts = math.ceil(others / fleet.waves) if number < fleet.waves else 0
        if hosts:
            seconds += seeded * 8 / min(fleet.lan * seeds / hosts, fleet.lan) + work
    return Outcome(seconds, begun.megabytes + fleet.hosts * fleet.documents)


@dataclasses.dataclass(frozen=True)
class Controller:
    """Seconds of processor that the controller spends on a host before the waves and in its wave, spread over so many
    processors, and seconds that the tasks of a wave take however few its hosts are.
    """

    before: float
    wave: float
    processors: int
    least: float


@dataclasses.dataclass(frozen=True)
class Waves:
    """Sizes of the waves, seconds before the first and of all of them, and the longest that a host is on trial."""

    sizes: tuple[int, ...]
    before: float
    seconds: float
    trial: float


def sizes(hosts: int, canaries: int, shares: list[str], most: int) -> tuple[int, ...]:
    """As the role arranges them: the canaries, then shares of all hosts, none larger than ``most``."""
    found: list[int] = []

    def add(number: int) -> None:
        while number > 0:
            found.append(min(number, most))
            number -= found[-1]

    add(min(canaries, hosts))
    left = hosts - min(canaries, hosts)
    position = 0
    while left > 0:
        text = shares[min(position, len(shares) - 1)]
        size = math.ceil(hosts * float(text[:-1]) / 100) if text.endswith("%") else int(text)
        size = min(left, max(1, size))
        add(size)
        left, position = left - size, position + 1
    return tuple(found)


def rollout(of: tuple[int, ...], controller: Controller, soak: list[float]) -> Waves:
    """What waves of these sizes take. A host is on trial from its activation, which is somewhere in the first part of
    its wave, until it is confirmed in the last.
    """
    seconds = longest = 0.0
    for number, hosts in enumerate(of):
        work = controller.least + hosts * controller.wave / controller.processors
        one = work + soak[min(number, len(soak) - 1)]
        seconds, longest = seconds + one, max(longest, one)
    return Waves(of, sum(of) * controller.before / controller.processors, seconds, longest)


def tell_rollouts(options: argparse.Namespace) -> None:
    controller = Controller(*options.controller, options.processors, options.least)
    print(
        "| hosts | sites | waves | minutes to fetch | minutes before the waves | minutes of waves | origin sends |",
        end="",
    )
    print(" a bad image reaches | longest trial |")
    print("|---|---|---|---|---|---|---|---|---|")
    for hosts in options.hosts:
        sites = options.sites or max(1, hosts // 250)
        fleet = Fleet(hosts, sites, 1, options.origin, options.site, options.lan)
        # One seed in each site, filled once; then all of its hosts take from it.
        fetched = by_seeds(fleet, options.update, options.update, 1, options.work)
        found = rollout(sizes(hosts, options.canaries, options.shares, options.unavailable), controller, options.soak)
        print(
            f"| {hosts} | {sites} | {len(found.sizes)} | {fetched.seconds / 60:.1f} | {found.before / 60:.1f} | "
            f"{found.seconds / 60:.1f} | {fetched.megabytes / 1000:.2f} GB | {found.sizes[0]} hosts | "
            f"{found.trial:.0f} s |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[10, 1000, 100_000])
    parser.add_argument("--sites", type=int, default=0, help="default: one for each 250 hosts")
    parser.add_argument("--waves", type=int, default=4)
    parser.add_argument("--origin", type=float, default=10_000, help="the registry's link")
    parser.add_argument("--site", type=float, default=100, help="a site's link to the registry")
    parser.add_argument("--lan", type=float, default=1000, help="a host's link within its site")
    parser.add_argument("--seeds", type=int, default=2, help="of each site")
    parser.add_argument("--update", type=float, default=60.5, help="whole layers")
    parser.add_argument("--delta", type=float, default=1.5)
    parser.add_argument("--peer", type=float, default=17.4, help="objects that are missing, as a peer sends them")
    parser.add_argument(
        "--documents", type=float, default=0.01, help="manifests and configurations that each host asks the origin for"
    )
    parser.add_argument("--work", type=float, default=2.0, help="seconds of processor for a pull")
    parser.add_argument("--rollout", action="store_true", help="tell of whole rollouts")
    parser.add_argument("--canaries", type=int, default=2)
    parser.add_argument("--shares", nargs="+", default=["10%", "25%", "100%"], help="rollout_waves")
    parser.add_argument("--unavailable", type=int, default=20, help="rollout_max_unavailable")
    parser.add_argument("--soak", type=float, nargs="+", default=[60.0, 10.0], help="rollout_soak")
    parser.add_argument("--controller", type=float, nargs=2, default=[0.35, 0.25], help="processor for a host, twice")
    parser.add_argument("--processors", type=int, default=2, help="of the controller")
    parser.add_argument("--least", type=float, default=5.0, help="seconds of a wave's tasks however few hosts it has")
    options = parser.parse_args()
    if options.rollout:
        tell_rollouts(options)
        return
    print("| hosts | sites | way | minutes | origin sends |")
    print("|---|---|---|---|---|")
    for hosts in options.hosts:
        sites = options.sites or max(1, hosts // 250)
        fleet = Fleet(hosts, sites, options.waves, options.origin, options.site, options.lan, options.documents)
        for name, found in (
            ("layers", direct(fleet, options.update, options.work)),
            ("delta", direct(fleet, options.delta, options.work)),
            ("seeds by layers, peers", by_seeds(fleet, options.update, options.peer, options.seeds, options.work)),
            ("seeds by delta, peers", by_seeds(fleet, options.delta, options.peer, options.seeds, options.work)),
        ):
            print(f"| {hosts} | {sites} | {name} | {found.seconds / 60:.1f} | {found.megabytes / 1000:.2f} GB |")


if __name__ == "__main__":
    main()

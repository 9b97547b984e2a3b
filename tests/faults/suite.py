"""The command line of `scripts/faults`: runs the faults one after the other, and prints the table."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from faults import REPOSITORY
from faults.cluster import Cluster
from faults.faults import FAULTS, Fault
from faults.processes import now
from faults.scene import Outcome, Scene
from faults.verdict import Loss
from support import pb
from support.faketime import find_library
from support.mail import Mailbox

# The data of a database machine fit into this, with its log of changes.
DISK_MIB = 1280


def main() -> int:
    options = _options()
    # The cluster is taken down in any case.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pb.load(pb.generate())
    chosen, left_out = _chosen(options)
    for round_ in range(1, options.rounds + 1):
        if options.rounds > 1:
            print(f"\nRound {round_} of {options.rounds}", flush=True)
        if not run(chosen, options):
            return 1
    for name, why in left_out.items():
        print(f"NOT RUN: {name}, {why}")
    return 1 if left_out and os.environ.get("CI") == "true" and not options.only else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/faults", description="Injects faults into a cluster under load, and checks that nothing is lost."
    )
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=20, help="how long each fault lasts at least (20)")
    parser.add_argument("--rounds", type=int, default=1, help="how many times, each on a new cluster")
    parser.add_argument("--directory", type=Path, help="an empty or new directory; without it a temporary one")
    parser.add_argument(
        "--binary", type=Path, default=REPOSITORY / "target/release/postern", help="the Postern to test"
    )
    parser.add_argument("--previous", type=Path, help="the Postern before it, for rolling-upgrade")
    options = parser.parse_args()
    for binary in (options.binary, options.previous):
        if binary is not None and not binary.exists():
            parser.error(f"{binary} is not there")
    options.binary = options.binary.resolve()
    options.previous = options.previous and options.previous.resolve()
    return options


def _chosen(options: argparse.Namespace) -> tuple[list[Fault], dict[str, str]]:
    """The faults to inject, and those for which something is missing."""
    missing = {}
    if options.previous is None:
        missing["previous"] = "because no other binary was given with --previous"
    if os.geteuid() != 0:
        missing["disk"] = "because only root can mount a file system"
    if find_library() is None:
        missing["faketime"] = "because libfaketime is not installed"
    wanted = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    left_out = {fault.name: missing[fault.needs] for fault in wanted if fault.needs in missing}
    return [fault for fault in wanted if fault.name not in left_out], left_out


def run(chosen: list[Fault], options: argparse.Namespace) -> bool:
    """One cluster, all chosen faults, and the table."""
    upgrade = any(fault.needs == "previous" for fault in chosen)
    mailbox = Mailbox().start()
    cluster = Cluster.create(
        options.directory,
        options.previous if upgrade else options.binary,
        disk_mib=DISK_MIB if any(fault.needs == "disk" for fault in chosen) else None,
        mail_url=mailbox.url,
    )
    good, scene = False, None
    try:
        started = now()
        cluster.up()
        scene = Scene(cluster, mailbox, options.binary, options.previous if upgrade else None, options.seconds)
        scene.begin()
        print(f"{cluster.directory}: ready after {now() - started:.0f} s", flush=True)
        outcomes = []
        for fault in chosen:
            outcomes.append(scene.play(fault))
            print("\n  ".join([_line(outcomes[-1]), *outcomes[-1].complaints[:5]]), flush=True)
        good = _report(scene, outcomes, scene.last_verdict(), now() - started)
    finally:
        if scene is not None:
            scene.close()
        mailbox.close()
        if good or not os.environ.get("POSTERN_KEEP_CLUSTER"):
            cluster.down()
    return good


def _report(scene: Scene, outcomes: list[Outcome], losses: list[Loss], seconds: float) -> bool:
    """Prints the table and what is wrong, and tells whether nothing is."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    others = [loss for loss in losses if loss.during not in by_name]
    for loss in losses:
        if loss.during in by_name and loss not in by_name[loss.during].losses:
            by_name[loss.during].losses.append(loss)
    print(f"\n{'fault':22} {'tried':>7} {'acknowledged':>12} {'lost':>5} {'healed':>8}  failed calls, and notes")
    for outcome in outcomes:
        print(_line(outcome))
    tried, acknowledged = scene.counted()
    lost = sum(len(outcome.losses) for outcome in outcomes) + len(others)
    print(f"{'all, with the verdicts':22} {tried:7} {acknowledged:12} {lost:5}           in {seconds:.0f} s")
    complaints = [f"{outcome.name}: {text}" for outcome in outcomes for text in outcome.complaints]
    complaints += [f"LOST during {loss.during}: {loss.what}" for outcome in outcomes for loss in outcome.losses]
    complaints += [f"LOST: {loss.what}" for loss in others] + scene.panics()
    for complaint in complaints[:40]:
        print(f"  {complaint}")
    verdict = f"FAILED: {len(complaints)} complaints" if complaints else "PASSED"
    print(f"{time.strftime('%H:%M:%S')} {verdict}", flush=True)
    return not complaints


def _line(outcome: Outcome) -> str:
    heal = "-" if outcome.heal is None else f"{outcome.heal:.1f} s"
    failed = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.failed.items()))
    words = "; ".join(part for part in (failed, *outcome.notes) if part)
    mark = "" if outcome.good else "  FAILED"
    numbers = f"{outcome.tried:7} {outcome.acknowledged:12} {len(outcome.losses):5} {heal:>8}"
    return f"{outcome.name:22} {numbers}  {words}{mark}"


if __name__ == "__main__":
    sys.exit(main())

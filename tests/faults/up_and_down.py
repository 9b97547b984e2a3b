"""The command line of `scripts/cluster`."""

import argparse
import sys
from pathlib import Path

from faults import REPOSITORY
from faults.cluster import Cluster


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/cluster", description="Postern on a cluster of PostgreSQL, on loopback."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster and print where it is")
    up.add_argument("directory", nargs="?", type=Path, help="an empty or new directory; without it a temporary one")
    up.add_argument("--binary", type=Path, default=REPOSITORY / "target/release/postern", help="the Postern to run")
    up.add_argument("--mail-url", default="log:", help="where its mails go")
    for name, text in (("down", "stop a cluster and remove its directory"), ("status", "print what runs")):
        commands.add_parser(name, help=text).add_argument("directory", type=Path)
    options = parser.parse_args()

    if options.command == "up":
        if not options.binary.exists():
            parser.error(f"{options.binary} is not there: build it, or name another one with --binary")
        cluster = Cluster.create(options.directory, options.binary, mail_url=options.mail_url)
        print(cluster.directory, flush=True)
        try:
            cluster.up()
        except BaseException:
            print(f"the logs are below {cluster.directory}; `scripts/cluster down` removes them", file=sys.stderr)
            raise
        print(cluster.status())
        return 0
    cluster = Cluster(options.directory.resolve())
    if options.command == "down":
        cluster.down()
        return 0
    print(cluster.status())
    return 0 if cluster.is_well() else 1


if __name__ == "__main__":
    sys.exit(main())

"""What the process of a server uses, from `/proc`."""

import os
import resource


def resident(server) -> float:
    """The resident memory, in MiB."""
    with open(f"/proc/{server.pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


def cpu_seconds(server) -> float:
    """The time that the process has spent on a CPU."""
    with open(f"/proc/{server.pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

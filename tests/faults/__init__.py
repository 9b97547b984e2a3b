"""A cluster on one machine, and the faults that are injected into it while clients keep a ledger.

`scripts/cluster` and `scripts/faults` are its command lines. It uses the helpers of the client tests (`support`).

    processes    starts, stops and finds processes that outlive the one that started them
    cluster      etcd, PostgreSQL under Patroni, HAProxy, PgBouncer and three Postern
    calls        the RPCs that the clients make
    ledger       what the clients intended and what they were told, in files
    load         clients that call without a pause, and probes of each replica
    verdict      reads the ledger and asks Postern whether everything acknowledged is there
    cutter       a proxy that cuts connections after a commit
    faults       one function for each fault
    suite        runs faults one after the other and prints the table
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SUPPORT = str(REPOSITORY / "tests" / "clients")
if SUPPORT not in sys.path:
    sys.path.insert(0, SUPPORT)

"""Helpers of the black-box tests: the server, the databases and the clients.

They do not depend on the code of Postern. They depend on the contract, the command line, the ready line of the log and
a few names of tables and columns.
"""

import os

# This must be set before grpc is imported. PostgreSQL is started as another user, for which Python calls fork(), and
# the fork handlers of gRPC sometimes abort the child while calls are in progress. No child process here uses gRPC.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

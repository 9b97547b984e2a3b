"""What the outside tests stand on: the server, the databases, the clients.

Nothing here knows how Postern is built. It knows the contract, the command
line, the log's ready line and a few table names to look at afterwards.
"""

import os

# Before grpc is imported: PostgreSQL is started as another user, which Python does by a real fork(), and
# gRPC's fork handlers abort the child now and then when calls are under way. No child here uses gRPC.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

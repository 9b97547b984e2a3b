"""The environment of the programs under test: only the `POSTERN_*` settings that a test names."""

import os


def own_environment(**settings) -> dict[str, str]:
    """This process's environment with these `POSTERN_*` settings and no others."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POSTERN_")}
    for name, value in settings.items():
        if value is not None:
            environment[f"POSTERN_{name.upper()}"] = str(value)
    return environment

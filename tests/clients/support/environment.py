"""The environment of the programs under test: only the settings that a test names."""

import os


def own_environment(**settings) -> dict[str, str]:
    """This process's environment with these settings and no others. Those of OpenTelemetry are in upper case."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("POSTERN_", "OTEL_"))}
    for name, value in settings.items():
        if value is not None:
            environment[name if name.isupper() else f"POSTERN_{name.upper()}"] = str(value)
    return environment

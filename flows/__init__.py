"""What runs, in what order: Prefect flows and the command line. Nothing is computed here."""

import os

# Prefect and the hub read these when they are imported. A temporary Prefect server takes 10 s to start on an idle
# machine and longer on a busy one; nothing is reported to anybody.
for _name, _value in {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

"""Why a prompt missed. `lint` says it of logs and transcripts, before any engine runs."""

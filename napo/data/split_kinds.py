"""How a log may be split. The command line reads the names, so nothing heavy is imported here."""

SPLIT_KINDS = ("user", "leave-last-out", "time")

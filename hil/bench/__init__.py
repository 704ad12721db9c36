"""The bench daemon: owners of instruments, player, power loop, safety, leases, consoles, recorder, exporter, API."""

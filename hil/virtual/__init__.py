"""The virtual bench: an emulated board, its supply and its link box, for a machine with no hardware."""

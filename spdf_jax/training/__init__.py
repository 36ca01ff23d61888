"""A run: its state, compiled steps, phases, the loop over them, and what is saved of it."""

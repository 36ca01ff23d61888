"""Circuits: which few nodes of a model do a task (`tasks`), found by gates (`gates`), with the weights between them (`graph`)."""

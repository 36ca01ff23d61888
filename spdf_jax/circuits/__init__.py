"""Circuits: the few nodes of a model that do a task (`tasks`), found by gates (`gates`), and the weights between (`graph`)."""

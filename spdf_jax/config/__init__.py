"""Configuration: a run (`run`), a sweep of runs (`sweep`), what is read into them (`read`) and checked (`checks`), recipes."""

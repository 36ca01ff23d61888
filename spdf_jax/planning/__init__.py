"""What a run will do and cost, before it runs: in words, on a pod that is not there, at another size."""

"""Workdirs in object storage: a folder of this machine that is published, and the lease by which one run has it."""

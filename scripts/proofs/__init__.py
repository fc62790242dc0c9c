"""Proofs that are too long for the tests: each breaks real runs of the command many times over, and counts.

forks      many commands without importing everything anew
syscalls   ending a process before its nth system call that changes a file
tiny       a model, rows and a config that train in a second
kills      kill -9, at random moments and between any two such calls
stops      SIGTERM and its like, on one process and on two
shortages  memory and disks that run out
canaries   secrets that must be in nothing that is written
corpus     models, adapters, templates and rows as an attacker would make them
wild       configs and rows as nobody writes them
"""

"""The agent: PID 1 of a guest, or a host process; it runs the containers of one sandbox by crun.

Imports are few and late on purpose: an emulated CPU spends 10 times what a real one does on each.
"""

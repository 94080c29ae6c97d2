"""What only a GPU can show: checks of correctness, speed and lifetimes, in one command, with a report.

Each check runs in a process of its own with a time limit, because a kernel that fails takes its process's
device context with it.
"""

"""A quarter of an hour on a GPU, in one command: is it right, how fast is it, and what can be trained meanwhile.

See `__main__` for the command and `timetable` for what happens when.
"""

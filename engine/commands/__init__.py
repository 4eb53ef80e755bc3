"""The subcommands of `konly`, one file each; engine/cli.py collects them.

options.py   the options that several share, as decorators, and what becomes of them
text.py      printing text as it comes, and the lines about it

At the top of these files only click is imported, and of the engine what needs no NumPy: `konly --help` answers at once.
"""

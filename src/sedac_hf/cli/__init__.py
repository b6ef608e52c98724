"""The command line: `main.py` lists the commands, each of which has a file of its own."""

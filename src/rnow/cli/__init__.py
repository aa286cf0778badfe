"""The command line: parses arguments and prints. Every command imports what it needs when it runs, not before."""

"""The commands: thin wrappers of the functions of the same names. Imports wait until a command needs them."""

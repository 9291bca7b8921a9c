"""The commands: a thin skin over the functions of the same names. Imports wait until a command needs them."""

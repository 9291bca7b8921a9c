"""What the commands are made with: flags from dataclasses of options, and the file that has the options of all."""

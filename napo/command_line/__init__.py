"""Parts of all commands: flags made from dataclasses of options, and the file with the options of all stages."""

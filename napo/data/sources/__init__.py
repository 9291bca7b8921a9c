"""One file a format. Each has ``read(path, *, max_bad, ...) -> Log`` or a Preset, where the source brings its split."""

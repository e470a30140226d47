"""The configuration of every model here, and the list of source files that travel with a saved one."""

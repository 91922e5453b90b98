"""The command line: options in, one call to the layer below, a table or JSON out."""

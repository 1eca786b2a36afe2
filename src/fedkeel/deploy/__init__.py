"""Federations of real machines: keys, the server, the nodes, and runs on them (`fedkeel deploy`)."""

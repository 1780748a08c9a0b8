"""H&E with multiplex immunofluorescence (mIF) of the same section → paired tiles."""

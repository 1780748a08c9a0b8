"""From slides and public data sets to paired tiles."""

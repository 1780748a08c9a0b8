"""Is a folder of paired tiles fit for training: what it holds, what is wrong, and which tiles to look at."""

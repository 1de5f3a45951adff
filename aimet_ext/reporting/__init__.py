"""Reports of whole runs: what was set, what it cost and what came of it."""

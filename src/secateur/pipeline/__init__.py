"""All stages in a row: from a MODEL argument to a plan or a folder, with a cache to resume from."""

"""Files that clients upload and that the server makes for them: rows in the database, bytes on disk."""

"""What happened, for those who want to be told: a log in the database, and what follows it. Knows no HTTP."""

"""The job table and its rules: the truth of the server. Knows no HTTP and no model code."""

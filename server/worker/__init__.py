"""The process that samples: takes job ids from Celery, makes videos, writes rows and files."""

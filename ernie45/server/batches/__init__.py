"""OpenAI's files and batches: uploads on disk, jobs in SQLite, lines that run behind everybody who waits."""

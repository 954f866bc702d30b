"""What people write (`job`, `sweep`), how it is read (`loading`), and what a job reads (`resolved`). Imports neither torch nor ray."""
